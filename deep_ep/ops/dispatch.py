"""The dispatch kernel: config fields, argument fields. Behaviour: include/deep_ep/kernels/dispatch.cuh."""

from __future__ import annotations

import ctypes
import enum
from dataclasses import dataclass

import torch

from deep_ep.jit import Kernel
from deep_ep.ops.arguments import LAUNCH_FIELDS, Patience, RecordShape, Routing, Rows, Window
from deep_ep.plan import Roles


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


class Scales(ctypes.Structure):
    _fields_ = [
        ("words", ctypes.c_void_p),
        ("token_stride", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("count", ctypes.c_int32),
    ]

    @staticmethod
    def of(scales: torch.Tensor | None) -> Scales:
        if scales is None:
            return Scales()
        return Scales(scales.data_ptr(), scales.stride(0), scales.stride(1), scales.shape[1])


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


class Places(ctypes.Structure):
    _fields_ = [("slots", ctypes.c_void_p), ("positions", ctypes.c_void_p)]


class DispatchArgs(ctypes.Structure):
    _fields_ = [
        ("window", Window),
        ("patience", Patience),
        ("routing", Routing),
        ("record", RecordShape),
        ("rows", Rows),
        ("weights", ctypes.c_void_p),
        ("scales", Scales),
        ("sent", Places),
        ("kept", Places),
        ("received", Received),
        ("counts", Counts),
        ("kept_idx", ctypes.c_void_p),
        ("stats", ctypes.c_void_p),
        ("host_words", ctypes.c_void_p),
        ("alignment", ctypes.c_int32),
        ("plan_flags", ctypes.c_int32),
        ("num_place_warps", ctypes.c_int32),
        *LAUNCH_FIELDS,
    ]


def dispatch_kernel(roles: Roles, places_from: PlacesFrom) -> Kernel:
    """One kernel for all sizes; a launch's ``num_send_blocks`` says what it does."""
    send, receive = roles.send, roles.receive
    config = DispatchConfig(
        num_send_warps=send.num_warps,
        num_send_stages=send.num_stages,
        num_send_storing=send.num_storing,
        num_receive_warps=receive.num_warps,
        num_receive_stages=receive.num_stages,
        num_receive_storing=receive.num_storing,
        places_from=places_from,
    )
    return Kernel("dispatch", config, DispatchArgs, roles.num_threads)
