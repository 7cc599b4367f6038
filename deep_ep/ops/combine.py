"""The combine kernel: config fields, argument fields. Behaviour: include/deep_ep/kernels/combine.cuh."""

from __future__ import annotations

import ctypes
import enum
import functools
from dataclasses import dataclass

from deep_ep.jit import Kernel
from deep_ep.ops.arguments import InPlace, Patience, RecordShape, Routing, Rows, Window
from deep_ep.plan import CombineRoles, RolesOfMachine


class Return(enum.Enum):
    """What of a token comes home from a rank that it went to."""

    ROW = "kRow"  # plain layout: the rank's row
    IN_PLACE = "kInPlace"  # the same, but nobody sends it: it is read where it lies
    SUM = "kSum"  # expanded layout: the sum of the rank's rows, rounded
    EVERY_ROW = "kEveryRow"  # expanded layout: each of them, in a record of its own


@dataclass(frozen=True)
class CombineConfig:
    num_send_warps: int
    num_send_stages: int
    num_send_storing: int
    num_heralds: int
    num_warps: int
    returned: Return


class RowsByOwner(ctypes.Structure):
    _fields_ = [("per_rank", ctypes.c_void_p)]


class Results(ctypes.Structure):
    _fields_ = [
        ("rows", Rows),
        ("weights", ctypes.c_void_p),
        ("metadata", ctypes.c_void_p),
        ("by_owner", RowsByOwner),
        ("record", RecordShape),
        ("num_topk", ctypes.c_int32),
    ]


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
        ("slots", ctypes.c_void_p),
        ("results", Results),
        ("in_place", InPlace),
        ("combined", Combined),
        ("routes", ctypes.c_void_p),
        ("plan_flags", ctypes.c_int32),
        ("num_send_blocks", ctypes.c_int32),
        ("piece_bytes", ctypes.c_int32),
        ("stage_bytes", ctypes.c_int32),
    ]


@functools.cache
def combine_kernel(roles: RolesOfMachine, returned: Return) -> Kernel:
    """One kernel for all sizes; a launch's ``num_send_blocks`` says in how many blocks warps send."""
    if returned is Return.IN_PLACE:
        config = CombineConfig(0, 1, 0, 0, roles.warps_in_place, returned)
        return Kernel("combine", config, CombineArgs, 32 * roles.warps_in_place)
    division = combine_roles(roles, returned)
    send = division.send
    config = CombineConfig(
        num_send_warps=send.num_warps,
        num_send_stages=send.num_stages,
        num_send_storing=send.num_storing,
        num_heralds=send.num_warps if division.heralds else 0,
        num_warps=division.num_warps,
        returned=returned,
    )
    return Kernel("combine", config, CombineArgs, division.num_threads)


def combine_roles(roles: RolesOfMachine, returned: Return) -> CombineRoles:
    """Who adds before it sends needs other roles than who only copies."""
    return roles.combine_sums if returned is Return.SUM else roles.combine
