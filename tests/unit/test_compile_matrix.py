"""Every kernel compiles with every compiler, for every architecture, and keeps all it has in registers. No GPU needed.

Beside the CUDA 13.0 of the environment this uses what ``make toolkits`` fetches into .toolkits: the newest CUDA 13, and
the headers of both versions of NCCL. The summary at the end of a test run shows the registers of each kernel.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from deep_ep import jit
from deep_ep.environment import Environment
from deep_ep.jit import tools
from tests.unit.jit_kit import REPOSITORY, TINY_KERNEL, start_python, write_headers

TOOLKITS = REPOSITORY / ".toolkits"
Measured = Callable[[str, object], None]

cuda_versions = pytest.mark.parametrize("cuda", ["13.0", "newest"])
architectures = pytest.mark.parametrize("architecture", ["sm_90a", "sm_100a"])
nccl_versions = pytest.mark.parametrize("nccl", ["2.30.7", "2.32.3"])


def cuda_folder(cuda: str) -> Path:
    """The folder that holds bin/nvcc and lib/libnvrtc.so.13; skips when the newest one was not fetched."""
    if cuda == "13.0":
        return tools.find_nvcc(Environment()).parents[1]
    folders = list(TOOLKITS.glob("cuda-*/nvidia/cu13"))
    if not folders:
        pytest.skip("the newest CUDA 13 was not fetched; run make toolkits")
    return folders[0]


def kernels() -> list[jit.Kernel]:
    """The package's kernels that include no NCCL header, and the tests' own tiny one, so that there is always one."""
    found = []
    if importlib.util.find_spec("deep_ep.ops"):
        from deep_ep import ops

        found = [kernel for kernel in ops.all_kernels() if not kernel.uses_nccl]
    return [TINY_KERNEL, *found]


def compile_all(toolchain: jit.Toolchain) -> list[tuple[str, bool, str]]:
    """(kernel, whether it uses local memory, what it needs) of every kernel."""
    rows = []
    for kernel in kernels():
        resources = jit.build(kernel, toolchain).resources
        assert resources is not None
        rows.append((f"{kernel.name} {kernel.config}", resources.uses_local_memory, str(resources)))
    return rows


def check(rows: list[tuple[str, bool, str]], where: str, measured: Measured) -> None:
    for name, _, needs in rows:
        measured("measured", f"{where}: {name}: {needs}")
    assert not [f"{name}: {needs}" for name, uses_local_memory, needs in rows if uses_local_memory]


def version_of(cuda: str) -> str:
    """Major and minor number, out of nvcc's own words."""
    text = jit.Nvcc("sm_90a", compiler=cuda_folder(cuda) / "bin" / "nvcc").version
    return text.partition("release ")[2].partition(",")[0]


def test_the_versions_are_what_they_are_called() -> None:
    assert version_of("13.0") == "13.0"
    major, minor = map(int, version_of("newest").split("."))
    assert major == 13
    assert minor > 0


@architectures
@cuda_versions
def test_nvcc(cuda: str, architecture: str, tmp_path: Path, record_property: Measured) -> None:
    compiler = cuda_folder(cuda) / "bin" / "nvcc"
    toolchain = jit.Nvcc(architecture, compiler=compiler, more_include_dirs=write_headers(tmp_path))
    check(compile_all(toolchain), f"nvcc {version_of(cuda)} {architecture}", record_property)


# cuda.bindings uses the library that is loaded already; a process can have one of them, hence a child.
COMPILE_WITH_NVRTC = """
import ctypes, json, sys
from pathlib import Path
library, architecture, include = sys.argv[1:]
ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
from deep_ep import jit
from tests.unit.test_compile_matrix import compile_all
toolchain = jit.Nvrtc(architecture, more_include_dirs=(Path(include),))
print(json.dumps([toolchain.version, compile_all(toolchain)]))
"""


@architectures
@cuda_versions
def test_nvrtc(cuda: str, architecture: str, tmp_path: Path, record_property: Measured) -> None:
    (include,) = write_headers(tmp_path)
    folder = cuda_folder(cuda) / "lib"
    child = start_python(
        COMPILE_WITH_NVRTC, str(folder / "libnvrtc.so.13"), architecture, str(include), LD_LIBRARY_PATH=str(folder)
    )
    out, error = child.communicate(timeout=600)
    assert child.returncode == 0, error
    version, rows = json.loads(out)
    assert version.startswith(f"{version_of(cuda)},")
    check(rows, f"NVRTC {version_of(cuda)} {architecture}", record_property)


# The package has no kernel yet that crosses NVLink domains. This one holds the way open: it includes NCCL's headers as
# such a kernel will, puts through Gin, and reads a peer's memory.
NCCL_PROBE = """\
#pragma once
#include <nccl.h>
#include <nccl_device.h>

#define EP_OFFSET(Type, field) offsetof(Type, field)

namespace deep_ep {
struct ProbeConfig {
  int peer;
};
struct ProbeArgs {
  const ncclDevComm* comm;
  ncclWindow_t window;
};
template <ProbeConfig C>
__device__ void probe(const ProbeArgs& args) {
  ncclGin gin(*args.comm, 0);
  gin.put(ncclTeamWorld(*args.comm), C.peer, args.window, 0, args.window, 1024, 1024);
  gin.flush(ncclCoopCta());
  int* peer = static_cast<int*>(ncclGetLsaPointer(args.window, 0, C.peer));
  *peer += 1;
}
}  // namespace deep_ep

#define EP_ENTRY(name, threads, Args) \\
  extern "C" __global__ void __launch_bounds__(threads, 1) name(const __grid_constant__ Args args)
"""


@dataclass(frozen=True)
class ProbeConfig:
    peer: int = 1


class ProbeArgs(ctypes.Structure):
    _fields_ = (("comm", ctypes.c_void_p), ("window", ctypes.c_void_p))


@pytest.mark.slow
@architectures
@cuda_versions
@nccl_versions
def test_nccls_headers(nccl: str, cuda: str, architecture: str, tmp_path: Path, record_property: Measured) -> None:
    nccl_include = TOOLKITS / f"nccl-{nccl}" / "include"
    if not nccl_include.is_dir():
        pytest.skip(f"the headers of NCCL {nccl} were not fetched; run make toolkits")
    (tmp_path / "deep_ep" / "kernels").mkdir(parents=True)
    (tmp_path / "deep_ep" / "kernels" / "probe.cuh").write_text(NCCL_PROBE)
    kernel = jit.Kernel("probe", ProbeConfig(), ProbeArgs, num_threads=128, uses_nccl=True)
    compiler = cuda_folder(cuda) / "bin" / "nvcc"
    toolchain = jit.Nvcc(architecture, compiler=compiler, nccl_include=nccl_include, more_include_dirs=(tmp_path,))
    built = jit.build(kernel, toolchain)
    assert kernel.entry.encode() in built.code
    record_property("measured", f"nvcc {version_of(cuda)} {architecture}: NCCL {nccl} probe: {built.resources}")
