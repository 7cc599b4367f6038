"""The three compilers: Nvrtc (in this process) and Nvcc for GPUs, Gxx for the simulated machine."""

from __future__ import annotations

import functools
import os
import platform
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from deep_ep.environment import Environment
from deep_ep.environment import read as read_environment
from deep_ep.errors import EPEnvironmentError
from deep_ep.jit.source import Kernel
from deep_ep.jit.tools import (
    CompilerError,
    find_disassembler,
    find_gxx,
    find_nccl_include,
    find_nvcc,
    run,
    version_text,
)

INCLUDE_DIR = Path(__file__).parents[1] / "include"
# NVRTC has no standard library; this folder holds the little of it that kernels use.
NVRTC_STD_DIR = INCLUDE_DIR / "deep_ep" / "jit_std"
INSTALL_NVRTC = "pip install cuda-bindings 'cuda-toolkit[nvrtc]==13.*'"
INSTALL_NCCL = "pip install nvidia-nccl-cu13==2.30.7"


class Toolchain(Protocol):
    """A compiler with its options. All but include_dirs and environment goes into the key of what it builds."""

    @property
    def environment(self) -> Environment: ...
    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def architecture(self) -> str: ...
    @property
    def flags(self) -> tuple[str, ...]: ...  # without any path
    @property
    def include_dirs(self) -> tuple[Path, ...]: ...
    @property
    def libraries(self) -> tuple[Path, ...]: ...  # copied beside the artifact and linked
    @property
    def source_name(self) -> str: ...  # of a kernel's translation unit
    @property
    def outputs(self) -> tuple[str, ...]: ...  # file names; the first is the artifact

    def check(self, kernel: Kernel) -> None:
        """Raise ValueError or EPEnvironmentError when this toolchain cannot build the kernel, whatever its source."""

    def command(self, sources: Sequence[str]) -> str:
        """What would be typed to build these source files, for people to read."""

    def compile(self, folder: Path, sources: Sequence[str]) -> str:
        """Build the source files that lie in folder and leave the outputs there.

        Returns:
            the compiler's log.

        Raises:
            CompilerError: the source is at fault.
            OSError: the folder is (full, read-only).
            EPEnvironmentError: the compiler cannot be run.
        """


@dataclass(frozen=True)
class Nvrtc:
    """NVIDIA's compiler as a library, in this process: no nvcc, no host compiler, under a tenth of a second.

    Attributes:
        architecture: such as "sm_90a".
        more_include_dirs: searched after the package's own.
    """

    architecture: str
    more_include_dirs: tuple[Path, ...] = ()
    environment: Environment = field(default_factory=read_environment)

    name = "nvrtc"
    source_name = "kernel.cu"
    libraries = ()

    @property
    def version(self) -> str:
        return _nvrtc_version()

    @property
    def include_dirs(self) -> tuple[Path, ...]:
        return (INCLUDE_DIR, NVRTC_STD_DIR, *self.more_include_dirs)

    @property
    def flags(self) -> tuple[str, ...]:
        return (
            f"--gpu-architecture={self.architecture}",
            f"--std=c++{self.environment.jit_cpp_standard}",
            "-default-device",
            "--no-cache",  # NVRTC's own: what comes out of it has no log, and so no register counts
            "--ptxas-options=-v",
            *_lineinfo(self.environment),
        )

    @property
    def outputs(self) -> tuple[str, ...]:
        return _cuda_outputs(self.environment)

    def check(self, kernel: Kernel) -> None:
        if kernel.uses_nccl:
            raise ValueError(f"kernel {kernel.name!r} includes NCCL's headers, which NVRTC cannot read; use Nvcc")

    def command(self, sources: Sequence[str]) -> str:
        return shlex.join(("nvrtc", *self._options(), *sources))

    def compile(self, folder: Path, sources: Sequence[str]) -> str:
        (source,) = sources
        nvrtc = _import_nvrtc()
        text = (folder / source).read_bytes()
        program = _checked(nvrtc, nvrtc.nvrtcCreateProgram(text, source.encode(), 0, [], []))
        try:
            options = [option.encode() for option in self._options()]
            (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
            log = _fetch(nvrtc, "ProgramLog", program).decode(errors="replace").rstrip("\0\n ")
            if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
                raise CompilerError(f"{log}\n{status.name}")
            (folder / self.outputs[0]).write_bytes(_fetch(nvrtc, "CUBIN", program))
            if "kernel.ptx" in self.outputs:
                (folder / "kernel.ptx").write_bytes(_fetch(nvrtc, "PTX", program).rstrip(b"\0"))
        finally:
            nvrtc.nvrtcDestroyProgram(program)
        return log + _dump_sass(folder, self)

    def _options(self) -> tuple[str, ...]:
        return (*self.flags, *(f"--include-path={path}" for path in self.include_dirs))


@dataclass(frozen=True)
class Nvcc:
    """NVIDIA's compiler as a program; it alone reads NCCL's device headers.

    Attributes:
        architecture: such as "sm_90a".
        compiler: its path; by default EP_JIT_NVCC_COMPILER, else CUDA_HOME's, else the one that pip installed.
        nccl_include: the folder of nccl_device.h; by default below EP_NCCL_ROOT_DIR, else pip's.
        more_include_dirs: searched after the package's own.
    """

    architecture: str
    compiler: Path | None = None
    nccl_include: Path | None = None
    more_include_dirs: tuple[Path, ...] = ()
    environment: Environment = field(default_factory=read_environment)

    name = "nvcc"
    source_name = "kernel.cu"
    libraries = ()

    @property
    def version(self) -> str:
        # nvcc itself obeys these two, as if they stood on its command line.
        inherited = [os.environ.get(name, "") for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")]
        return "\n".join(filter(None, [version_text(self._compiler()), *inherited]))

    @property
    def flags(self) -> tuple[str, ...]:
        return (
            "-cubin",
            f"-arch={self.architecture}",
            f"-std=c++{self.environment.jit_cpp_standard}",
            "--expt-relaxed-constexpr",
            "-Xptxas=-v",
            *_lineinfo(self.environment),
        )

    @property
    def include_dirs(self) -> tuple[Path, ...]:
        nccl = self._nccl_include()
        return (INCLUDE_DIR, *self.more_include_dirs, *((nccl,) if nccl else ()))

    @property
    def outputs(self) -> tuple[str, ...]:
        return _cuda_outputs(self.environment)

    def check(self, kernel: Kernel) -> None:
        if kernel.uses_nccl and self._nccl_include() is None:
            raise EPEnvironmentError(
                f"kernel {kernel.name!r} needs NCCL's device headers and none were found; "
                f"set EP_NCCL_ROOT_DIR or run: {INSTALL_NCCL}"
            )

    def command(self, sources: Sequence[str]) -> str:
        return shlex.join(self._words(sources))

    def compile(self, folder: Path, sources: Sequence[str]) -> str:
        log = run(self._words(sources), folder)
        if "kernel.ptx" in self.outputs:
            to_ptx = ["-ptx" if word == "-cubin" else word for word in self._words(sources)]
            run([*to_ptx[:-1], "kernel.ptx"], folder)
        return log + _dump_sass(folder, self)

    def _words(self, sources: Sequence[str]) -> list[str]:
        includes = [f"-I{path}" for path in self.include_dirs]
        return [str(self._compiler()), *self.flags, *includes, *sources, "-o", self.outputs[0]]

    def _nccl_include(self) -> Path | None:
        return self.nccl_include or find_nccl_include(self.environment)

    def _compiler(self) -> Path:
        return self.compiler or find_nvcc(self.environment)


@dataclass(frozen=True)
class Gxx:
    """The host's compiler, for the simulated machine: kernels, and the engine that runs them.

    Attributes:
        race_detector: compile with -fsanitize=thread.
        defines: macros, as ``NAME`` or ``NAME=value``.
        more_flags: appended, so they win; no paths among them.
        more_include_dirs: searched after the package's own.
        libraries: shared objects to link; they are copied beside the artifact, so it finds them wherever it lies.
        artifact_name: a shared object if it ends with .so, else a program.
    """

    race_detector: bool = False
    defines: tuple[str, ...] = ()
    more_flags: tuple[str, ...] = ()
    more_include_dirs: tuple[Path, ...] = ()
    libraries: tuple[Path, ...] = ()
    artifact_name: str = "kernel.so"
    environment: Environment = field(default_factory=read_environment)

    name = "g++"
    source_name = "kernel.cpp"

    @property
    def version(self) -> str:
        return version_text(find_gxx())

    @property
    def architecture(self) -> str:
        return platform.machine()

    @property
    def flags(self) -> tuple[str, ...]:
        shared = self.artifact_name.endswith(".so")
        return (
            f"-std=c++{self.environment.jit_cpp_standard}",
            "-O1",
            "-g",
            "-Wall",
            "-fPIC",
            "-fno-omit-frame-pointer",
            *(("-fsanitize=thread",) if self.race_detector else ()),
            # Without unique symbols a kernel can be unloaded; a program's own symbols serve the kernels that it loads.
            *(("-shared", "-fno-gnu-unique") if shared else ("-rdynamic",)),
            *(f"-D{define}" for define in self.defines),
            *self.more_flags,
        )

    @property
    def include_dirs(self) -> tuple[Path, ...]:
        return (INCLUDE_DIR, *self.more_include_dirs)

    @property
    def outputs(self) -> tuple[str, ...]:
        return (self.artifact_name,)

    def check(self, kernel: Kernel) -> None:
        """Every kernel runs in simulation."""

    def command(self, sources: Sequence[str]) -> str:
        return shlex.join(self._words(sources))

    def compile(self, folder: Path, sources: Sequence[str]) -> str:
        for library in self.libraries:
            shutil.copy(library, folder)
        return run(self._words(sources), folder)

    def _words(self, sources: Sequence[str]) -> list[str]:
        words = [str(find_gxx()), *self.flags]
        for path in self.include_dirs:
            # Reports and messages name deep_ep/include/..., wherever the package lies: so one build serves all copies.
            words += [f"-I{path}", f"-ffile-prefix-map={path}={path.parent.name}/{path.name}"]
        words += [*sources, "-o", self.artifact_name]
        if self.libraries:
            words += ["-L.", *(f"-l:{library.name}" for library in self.libraries), "-Wl,-rpath,$ORIGIN"]
        return words + ([] if self.artifact_name.endswith(".so") else ["-ldl", "-pthread"])


def default_toolchain(kernel: Kernel, architecture: str, environment: Environment | None = None) -> Toolchain:
    """The compiler for a kernel on a GPU: NVRTC, unless NCCL's headers or EP_JIT_NVCC_COMPILER ask for nvcc.

    Args:
        architecture: such as "sm_90a".
        environment: by default, the variables as they are now.
    """
    environment = environment or read_environment()
    if kernel.uses_nccl or environment.jit_nvcc_compiler:
        return Nvcc(architecture, environment=environment)
    return Nvrtc(architecture, environment=environment)


def _lineinfo(environment: Environment) -> tuple[str, ...]:
    return ("-lineinfo",) if environment.jit_with_lineinfo else ()


def _cuda_outputs(environment: Environment) -> tuple[str, ...]:
    ptx = environment.jit_dump_ptx or environment.jit_dump_asm
    sass = environment.jit_dump_sass or environment.jit_dump_asm
    return ("kernel.cubin", *(("kernel.ptx",) if ptx else ()), *(("kernel.sass",) if sass else ()))


def _dump_sass(folder: Path, toolchain: Toolchain) -> str:
    """Write kernel.sass if it is among the outputs.

    Returns:
        what to add to the log.
    """
    if "kernel.sass" not in toolchain.outputs:
        return ""
    words = find_disassembler()
    text = run([*words, toolchain.outputs[0]], folder) if words else "no nvdisasm or cuobjdump was found\n"
    (folder / "kernel.sass").write_text(text)
    return "" if words else "\nkernel.sass is empty: install nvdisasm (it is part of the CUDA toolkit, and of Triton)"


def _import_nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise EPEnvironmentError(f"cuda.bindings.nvrtc cannot be imported ({error}); run: {INSTALL_NVRTC}") from error
    return nvrtc


@functools.cache
def _nvrtc_version() -> str:
    """Major and minor number, and the library's size, by which its patch releases differ: it knows no third number."""
    nvrtc = _import_nvrtc()
    try:
        major, minor = _checked(nvrtc, nvrtc.nvrtcVersion())
        from cuda.pathfinder import load_nvidia_dynamic_lib

        path = load_nvidia_dynamic_lib("nvrtc").abs_path
    except RuntimeError as error:
        raise EPEnvironmentError(f"NVRTC's library cannot be loaded ({error}); run: {INSTALL_NVRTC}") from error
    size = f", library of {os.path.getsize(path)} bytes" if path else ""
    return f"{major}.{minor}{size}"


def _checked(nvrtc: Any, results: tuple[Any, ...]) -> Any:
    status, *values = results
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise EPEnvironmentError(f"NVRTC failed before it compiled anything: {status.name}")
    return values[0] if len(values) == 1 else values


def _fetch(nvrtc: Any, what: str, program: Any) -> bytes:
    """One of a program's products: "ProgramLog", "CUBIN" or "PTX"."""
    data = bytearray(_checked(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program)))
    _checked(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, data))
    return bytes(data)
