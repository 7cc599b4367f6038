"""Kernels are compiled where they run, when they are first needed, and kept.

``Kernel`` says what to build, a toolchain how; ``build`` returns machine code. Importing this imports no CUDA.
"""

from deep_ep.jit.builder import Built, build, build_files, precompile
from deep_ep.jit.key import digest_of_headers
from deep_ep.jit.module import Resources
from deep_ep.jit.source import Kernel, generate
from deep_ep.jit.store import Store
from deep_ep.jit.toolchain import INCLUDE_DIR, Gxx, Nvcc, Nvrtc, Toolchain, default_toolchain

__all__ = [
    "Built",
    "INCLUDE_DIR",
    "Gxx",
    "Kernel",
    "Nvcc",
    "Nvrtc",
    "Resources",
    "Store",
    "Toolchain",
    "build",
    "build_files",
    "default_toolchain",
    "digest_of_headers",
    "generate",
    "precompile",
]
