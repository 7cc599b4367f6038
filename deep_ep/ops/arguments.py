"""Argument structs that several kernels share, field by field as in include/deep_ep.

Generated static_asserts hold each offset, so Python and C++ cannot drift apart.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Sequence
from typing import Any

import torch

from deep_ep.layout import MAX_RANKS, Record, WindowLayout, message_words
from deep_ep.plan import LaunchPlan


class Window(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_void_p * MAX_RANKS),
        ("rank", ctypes.c_int32),
        ("num_ranks", ctypes.c_int32),
        ("slots_per_source", ctypes.c_int32),
        ("message_words", ctypes.c_int32),
        ("number", ctypes.c_int32),
        ("partials", ctypes.c_uint64),
        ("messages", ctypes.c_uint64),
        ("arrived", ctypes.c_uint64),
        ("rows", ctypes.c_uint64),
    ]

    @staticmethod
    def of(layout: WindowLayout, rank: int, addresses: Sequence[int], number: int) -> Window:
        return Window(
            base=(ctypes.c_void_p * MAX_RANKS)(*addresses),
            rank=rank,
            num_ranks=layout.num_ranks,
            slots_per_source=layout.slots_per_source,
            message_words=message_words(layout.num_ranks),
            number=number,
            partials=layout["partials"].offset,
            messages=layout["messages"].offset,
            arrived=layout["arrived"].offset,
            rows=layout["rows"].offset,
        )


class FaultRecord(ctypes.Structure):
    """What the first wait that timed out leaves for the host; behind it lies another, of the first that took long."""

    _fields_ = [
        ("state", ctypes.c_uint32),
        ("phase", ctypes.c_uint32),
        ("block", ctypes.c_int32),
        ("thread", ctypes.c_int32),
        ("peer", ctypes.c_int32),
        ("expected", ctypes.c_uint32),
        ("seen", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("waited_ns", ctypes.c_uint64),
    ]


class Patience(ctypes.Structure):
    _fields_ = [
        ("fault", ctypes.c_void_p),
        ("timeout_ns", ctypes.c_uint64),
        ("notice_ns", ctypes.c_uint64),
        ("gave_up", ctypes.c_void_p),
    ]


class Routing(ctypes.Structure):
    _fields_ = [
        ("topk_idx", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int32),
        ("num_topk", ctypes.c_int32),
        ("num_experts", ctypes.c_int32),
        ("experts_per_rank", ctypes.c_int32),
        ("index_bytes", ctypes.c_int32),
        ("max_tokens", ctypes.c_int32),
        ("ranks_per_expert", ctypes.c_float),
    ]

    @staticmethod
    def of(topk_idx: torch.Tensor, num_experts: int, num_ranks: int, max_tokens: int) -> Routing:
        return Routing(
            topk_idx=topk_idx.data_ptr(),
            num_tokens=topk_idx.shape[0],
            num_topk=topk_idx.shape[1],
            num_experts=num_experts,
            experts_per_rank=num_experts // num_ranks,
            index_bytes=topk_idx.element_size(),
            max_tokens=max_tokens,
            ranks_per_expert=num_ranks / num_experts,
        )


class RecordShape(ctypes.Structure):
    _fields_ = [("row_bytes", ctypes.c_int32), ("tail_bytes", ctypes.c_int32)]

    @staticmethod
    def of(record: Record) -> RecordShape:
        return RecordShape(record.row_bytes, record.tail_bytes)


class Rows(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p), ("stride", ctypes.c_int64)]

    @staticmethod
    def of(x: torch.Tensor) -> Rows:
        return Rows(x.data_ptr(), x.stride(0) * x.element_size())


class PlanFlag(enum.IntFlag):
    """What every rank must say alike of a call, beside its sizes (include/deep_ep/wire/plan.cuh)."""

    WEIGHTS = 1
    CACHED = 2
    SCALES = 4
    EVERY_ROW = 8


def pointer(tensor: torch.Tensor | None) -> int | None:
    """What an argument holds for an optional tensor."""
    return None if tensor is None else tensor.data_ptr()


# The last fields of a kernel that sends and receives: how a launch divides its blocks and cuts its rows.
LAUNCH_FIELDS = [
    ("num_send_blocks", ctypes.c_int32),
    ("send_piece_bytes", ctypes.c_int32),
    ("send_stage_bytes", ctypes.c_int32),
    ("receive_piece_bytes", ctypes.c_int32),
    ("receive_stage_bytes", ctypes.c_int32),
    ("tables_bytes", ctypes.c_int32),
]


def set_launch_fields(args: Any, launch: LaunchPlan) -> None:
    """Fill in LAUNCH_FIELDS from a plan, all but ``num_send_blocks``."""
    args.send_piece_bytes = launch.send.piece_bytes
    args.send_stage_bytes = launch.send.stage_bytes
    args.receive_piece_bytes = launch.receive.piece_bytes
    args.receive_stage_bytes = launch.receive.stage_bytes
    args.tables_bytes = launch.tables_bytes
