"""The barrier kernel: argument fields. Behaviour: include/deep_ep/kernels/barrier.cuh."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from deep_ep.jit import Kernel
from deep_ep.ops.arguments import Patience, Window


@dataclass(frozen=True)
class BarrierConfig:
    """There is but one barrier."""


class BarrierArgs(ctypes.Structure):
    _fields_ = [("window", Window), ("patience", Patience)]


BARRIER = Kernel("barrier", BarrierConfig(), BarrierArgs, num_threads=32)
