"""Programs and header folders of the host: where they are, which version, and how they are run."""

from __future__ import annotations

import errno
import functools
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from deep_ep.environment import Environment
from deep_ep.errors import EPEnvironmentError

INSTALL_NVCC = "pip install 'cuda-toolkit[nvcc,cccl,cudart]==13.*'"
# What a compiler says when the folder and not the source is at fault.
FOLDER_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class CompilerError(Exception):
    """A compiler refused a source.

    Attributes:
        log: what it said.
    """

    def __init__(self, log: str) -> None:
        super().__init__(log)
        self.log = log


def find_nvcc(environment: Environment) -> Path:
    """EP_JIT_NVCC_COMPILER, else CUDA_HOME's, else the one that pip installed, else the PATH's."""
    if environment.jit_nvcc_compiler:
        chosen = shutil.which(environment.jit_nvcc_compiler)
        if chosen is None:
            raise EPEnvironmentError(
                f"EP_JIT_NVCC_COMPILER is {environment.jit_nvcc_compiler}, which is no program; correct or unset it"
            )
        return Path(chosen)
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), *_pip_folders("nvidia", "cu13")]
    for home in homes:
        if home and os.access(Path(home) / "bin" / "nvcc", os.X_OK):
            return Path(home) / "bin" / "nvcc"
    if found := shutil.which("nvcc"):
        return Path(found)
    raise EPEnvironmentError(f"no nvcc was found; set EP_JIT_NVCC_COMPILER or CUDA_HOME, or run: {INSTALL_NVCC}")


def find_nccl_include(environment: Environment) -> Path | None:
    """The folder of nccl_device.h: below EP_NCCL_ROOT_DIR, else the one that pip installed."""
    roots = [environment.nccl_root_dir] if environment.nccl_root_dir else _pip_folders("nvidia", "nccl")
    for root in roots:
        if (root / "include" / "nccl_device.h").is_file():
            return root / "include"
    return None


def find_gxx() -> Path:
    """The system's own g++ before any other on the PATH: some of those link half a standard library statically."""
    found = shutil.which("g++", path=os.pathsep.join(("/usr/bin", os.environ.get("PATH", ""))))
    if found is None:
        raise EPEnvironmentError("the simulated machine needs g++ and none was found; run: apt-get install g++")
    return Path(found)


def _pip_folders(*parts: str) -> list[Path]:
    """Where pip put a folder of a namespace package; looked up without importing anything."""
    spec = importlib.util.find_spec(parts[0])
    places = spec.submodule_search_locations if spec else None
    return [folder for place in places or () if (folder := Path(place, *parts[1:])).is_dir()]


@functools.cache
def version_text(compiler: Path) -> str:
    """What ``--version`` says; the cache spares a process for every kernel."""
    try:
        run = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, env=_child_environ())
    except (OSError, subprocess.CalledProcessError) as error:
        raise EPEnvironmentError(f"{compiler} --version failed: {error}") from error
    return run.stdout.strip()


def _child_environ(folder: Path | None = None) -> dict[str, str]:
    """English messages, and temporary files where the rest of the build is, so that one sweep clears them all."""
    return {**os.environ, "LC_ALL": "C", **({"TMPDIR": str(folder)} if folder else {})}


def run(words: Sequence[str], folder: Path) -> str:
    """Run a compiler in a folder.

    Returns:
        all that it printed.

    Raises:
        as Toolchain.compile.
    """
    try:
        done = subprocess.run(
            words,
            cwd=folder,
            env=_child_environ(folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
    except (FileNotFoundError, PermissionError) as error:
        raise EPEnvironmentError(f"{words[0]} cannot be run: {error}") from error
    if done.returncode == 0:
        return done.stdout.rstrip()
    for fault in FOLDER_FAULTS:
        if os.strerror(fault) in done.stdout:
            raise OSError(fault, os.strerror(fault), str(folder))
    raise CompilerError(f"{done.stdout.rstrip()}\nexit status {done.returncode}")


def find_disassembler() -> list[str] | None:
    """The words that print a cubin's SASS when its name is put behind them; None when no such program is here."""
    triton = importlib.util.find_spec("triton")
    places = [os.environ.get("PATH", ""), os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    if triton and triton.origin:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    path = os.pathsep.join(places)
    for program, *options in (["nvdisasm", "-c"], ["cuobjdump", "-sass"]):
        if found := shutil.which(program, path=path):
            return [found, *options]
    return None
