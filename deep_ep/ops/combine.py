"""The combine kernel: config fields, argument fields. Behaviour: include/deep_ep/kernels/combine.cuh."""

from __future__ import annotations

import ctypes
from dataclasses import astuple, dataclass

from deep_ep.jit import Kernel
from deep_ep.ops.arguments import LAUNCH_FIELDS, Patience, RecordShape, Routing, Rows, Window
from deep_ep.plan import Roles


@dataclass(frozen=True)
class CombineConfig:
    num_send_warps: int
    num_send_stages: int
    num_send_storing: int
    num_receive_warps: int
    num_receive_stages: int
    num_receive_storing: int


class RowsByOwner(ctypes.Structure):
    _fields_ = [("per_rank", ctypes.c_void_p)]


class Combined(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("weights", ctypes.c_void_p),
        ("bias", ctypes.c_void_p * 2),
        ("bias_stride", ctypes.c_int64 * 2),
    ]


class CombineArgs(ctypes.Structure):
    _fields_ = [
        ("window", Window),
        ("patience", Patience),
        ("routing", Routing),
        ("record", RecordShape),
        ("rows", Rows),
        ("weights", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("by_owner", RowsByOwner),
        ("combined", Combined),
        *LAUNCH_FIELDS,
    ]


def combine_kernel(roles: Roles) -> Kernel:
    """One kernel for all sizes; a launch's ``num_send_blocks`` says what it does."""
    config = CombineConfig(*astuple(roles.send), *astuple(roles.receive))
    return Kernel("combine", config, CombineArgs, roles.num_threads)
