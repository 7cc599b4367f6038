"""What the tests of deep_ep.jit share: a tiny kernel, a compiler that does what a test tells it, child processes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deep_ep import jit
from deep_ep.environment import Environment

REPOSITORY = Path(__file__).parents[2]

# A kernel that needs none of our headers, so that these tests stand alone.
TINY = """\
#pragma once
#ifdef __CUDACC__
#define EP_DEVICE __device__ __forceinline__
#define EP_ENTRY(name, threads, Args) \\
  extern "C" __global__ void __launch_bounds__(threads, 1) name(const __grid_constant__ Args args)
#else
#define EP_DEVICE inline
#define EP_ENTRY(name, threads, Args) extern "C" void name(const Args& args)
#endif
#ifdef __CUDACC_RTC__
#define EP_OFFSET(Type, field) __INTADDR__(&(static_cast<Type*>(nullptr)->field))
#else
#include <cstddef>
#define EP_OFFSET(Type, field) offsetof(Type, field)
#endif
#include <deep_ep/tiny_factor.cuh>

namespace deep_ep {
struct TinyConfig {
  int scale;
  bool twice;
};
struct Range {
  int begin, end;
};
struct TinyArgs {
  int* values;
  Range range;
  void* peers[4];
  int offset;
};
template <TinyConfig C>
EP_DEVICE void tiny(const TinyArgs& args) {
  for (int i = args.range.begin; i < args.range.end; ++i)
    args.values[i] = args.values[i] * C.scale * (C.twice ? 2 : 1) * kFactor + args.offset;
}
}  // namespace deep_ep
"""
FACTOR = "#pragma once\nconstexpr int kFactor = 1;\n"


@dataclass(frozen=True)
class TinyConfig:
    scale: int = 3
    twice: bool = True


class Range(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_int32), ("end", ctypes.c_int32)]


class TinyArgs(ctypes.Structure):
    _fields_ = [
        ("values", ctypes.c_void_p),
        ("range", Range),
        ("peers", ctypes.c_void_p * 4),
        ("offset", ctypes.c_int32),
    ]


TINY_KERNEL = jit.Kernel("tiny", TinyConfig(), TinyArgs, num_threads=32)


def write_headers(folder: Path, factor: str = FACTOR) -> tuple[Path, ...]:
    """Put the tiny kernel's headers below a folder; what to pass as more_include_dirs."""
    (folder / "deep_ep" / "kernels").mkdir(parents=True, exist_ok=True)
    (folder / "deep_ep" / "kernels" / "tiny.cuh").write_text(TINY)
    (folder / "deep_ep" / "tiny_factor.cuh").write_text(factor)
    return (folder,)


def run_tiny(built: jit.Built) -> list[int]:
    """Call the shared object that Gxx made of the tiny kernel on 0, 1, 2, 3 with offset 1."""
    values = (ctypes.c_int32 * 4)(0, 1, 2, 3)
    args = TinyArgs(ctypes.addressof(values), Range(0, 4), (ctypes.c_void_p * 4)(), 1)
    ctypes.CDLL(str(built.artifact)).deep_ep_tiny(ctypes.byref(args))
    return list(values)


@dataclass(frozen=True)
class FakeToolchain:
    """A compiler that copies its source, after doing what a test wants done meanwhile."""

    environment: Environment = field(default_factory=Environment)
    name: str = "fake"
    version: str = "1"
    architecture: str = "none"
    flags: tuple[str, ...] = ()
    include_dirs: tuple[Path, ...] = ()
    libraries: tuple[Path, ...] = ()
    source_name: str = "source.txt"
    outputs: tuple[str, ...] = ("artifact.txt",)
    log: str = "done"
    meanwhile: Callable[[Path], None] = lambda folder: None

    def check(self, kernel: jit.Kernel) -> None:
        pass

    def command(self, sources: Sequence[str]) -> str:
        return " ".join(["fake", *sources])

    def compile(self, folder: Path, sources: Sequence[str]) -> str:
        self.meanwhile(folder)
        (folder / self.outputs[0]).write_bytes(b"".join((folder / source).read_bytes() for source in sources))
        return self.log


def build_text(toolchain: jit.Toolchain, store: jit.Store, text: str = "some text") -> jit.Built:
    """Build one source file; its artifact, from a FakeToolchain, is the text."""
    return jit.build_files("thing", {"source.txt": text}, toolchain, store=store)


def start_python(code: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Run Python code in a child process that can import deep_ep and tests."""
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), **variables}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Poll until a condition holds; AssertionError after some seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.01)
