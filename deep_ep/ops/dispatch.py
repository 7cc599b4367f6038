"""The dispatch kernel: config fields, argument fields. Behaviour: include/deep_ep/kernels/dispatch.cuh."""

from __future__ import annotations

import ctypes
import enum
import functools
from dataclasses import dataclass

import torch

from deep_ep.jit import Kernel
from deep_ep.ops.arguments import InPlace, Patience, RecordShape, Routing, Rows, Window
from deep_ep.plan import Roles

WORD_BYTES = 4  # of a scale factor
COPIED = 16  # bytes, of which the copy engine moves whole ones


class PlacesFrom(enum.Enum):
    """Who knows where tokens go."""

    SELECTIONS = "kSelections"  # the kernel, from topk_idx
    HANDLE = "kHandle"  # the handle of an earlier dispatch


@dataclass(frozen=True)
class DispatchConfig:
    num_send_warps: int
    num_send_stages: int
    num_send_storing: int
    num_receive_warps: int
    num_receive_stages: int
    num_receive_storing: int
    places_from: PlacesFrom
    in_place: bool


class Scales(ctypes.Structure):
    _fields_ = [
        ("words", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("count", ctypes.c_int32),
        ("in_rows", ctypes.c_int32),
    ]

    @staticmethod
    def of(scales: torch.Tensor | None) -> Scales:
        if scales is None:
            return Scales()
        address, (row_stride, stride), count = scales.data_ptr(), scales.stride(), scales.shape[1]
        aligned = not (address % COPIED or WORD_BYTES * row_stride % COPIED or WORD_BYTES * count % COPIED)
        return Scales(address, row_stride, stride, count, in_rows=aligned and stride == 1)


class Layout(enum.IntEnum):
    PLAIN = 0
    EXPANDED = 1


class Padding(enum.IntEnum):
    LEAVE = 0
    ZERO = 1


class Received(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("topk_idx", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("metadata", ctypes.c_void_p),
        ("known_metadata", ctypes.c_void_p),
        ("scales", Scales),
        ("rows", ctypes.c_int32),
        ("expanded_rows", ctypes.c_int32),
        ("layout", ctypes.c_int32),
        ("padding", ctypes.c_int32),
    ]


class Counts(ctypes.Structure):
    _fields_ = [
        ("per_rank", ctypes.c_void_p),
        ("per_expert_aligned", ctypes.c_void_p),
        ("per_expert_end", ctypes.c_void_p),
        ("per_expert", ctypes.c_void_p),
        ("number", ctypes.c_void_p),
    ]


class Least(ctypes.Structure):
    _fields_ = [("rows", ctypes.c_int32), ("expanded_rows", ctypes.c_int32)]


class DispatchArgs(ctypes.Structure):
    _fields_ = [
        ("window", Window),
        ("patience", Patience),
        ("routing", Routing),
        ("record", RecordShape),
        ("rows", Rows),
        ("weights", ctypes.c_void_p),
        ("scales", Scales),
        ("slots", ctypes.c_void_p),
        ("in_place", InPlace),
        ("received", Received),
        ("counts", Counts),
        ("kept_idx", ctypes.c_void_p),
        ("stats", ctypes.c_void_p),
        ("host_words", ctypes.c_void_p),
        ("least", Least),
        ("alignment", ctypes.c_int32),
        ("plan_flags", ctypes.c_int32),
        ("num_count_warps", ctypes.c_int32),
        ("first_count_block", ctypes.c_int32),
        ("num_send_blocks", ctypes.c_int32),
        ("num_receive_blocks", ctypes.c_int32),
        ("num_blocks", ctypes.c_int32),
        ("send_piece_bytes", ctypes.c_int32),
        ("send_stage_bytes", ctypes.c_int32),
        ("receive_piece_bytes", ctypes.c_int32),
        ("receive_stage_bytes", ctypes.c_int32),
        ("tables_bytes", ctypes.c_int32),
    ]


@functools.cache
def dispatch_kernel(roles: Roles, places_from: PlacesFrom, in_place: bool) -> Kernel:
    """One kernel for all sizes; a launch's division (deep_ep/plan.py) says what its blocks do."""
    send, receive = roles.send, roles.receive
    config = DispatchConfig(
        num_send_warps=send.num_warps,
        num_send_stages=send.num_stages,
        num_send_storing=send.num_storing,
        num_receive_warps=receive.num_warps,
        num_receive_stages=receive.num_stages,
        num_receive_storing=receive.num_storing,
        places_from=places_from,
        in_place=in_place,
    )
    return Kernel("dispatch", config, DispatchArgs, roles.num_threads)
