"""Argument structs that several kernels share, field by field as in include/deep_ep.

Generated static_asserts hold each offset, so Python and C++ cannot drift apart.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Sequence

import torch

from deep_ep.layout import MAX_RANKS, Record, WindowLayout, message_words


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
        ("routed", ctypes.c_uint64),
        ("labels", ctypes.c_uint64),
        ("rows", ctypes.c_uint64),
        ("registered", ctypes.c_uint64),
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
            routed=layout["routed"].offset,
            labels=layout["labels"].offset,
            rows=layout["rows"].offset,
            registered=layout["registered"].offset,
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
    def of(num_topk: int, num_experts: int, num_ranks: int, max_tokens: int) -> Routing:
        """Without tokens; those come with ``take``."""
        return Routing(
            num_topk=num_topk,
            num_experts=num_experts,
            experts_per_rank=num_experts // num_ranks,
            max_tokens=max_tokens,
            ranks_per_expert=num_ranks / num_experts,
        )

    def take(self, topk_idx: torch.Tensor) -> None:
        """The experts of each token of this call."""
        self.topk_idx = topk_idx.data_ptr()
        self.num_tokens = topk_idx.shape[0]
        self.index_bytes = topk_idx.element_size()


class RecordShape(ctypes.Structure):
    _fields_ = [("row_bytes", ctypes.c_int32), ("tail_bytes", ctypes.c_int32)]

    @staticmethod
    def of(record: Record) -> RecordShape:
        return RecordShape(record.row_bytes, record.tail_bytes)


class Rows(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p), ("stride", ctypes.c_int64)]

    def take(self, x: torch.Tensor) -> None:
        """The rows of this call."""
        self.x = x.data_ptr()
        self.stride = x.stride(0) * x.element_size()


class InPlace(ctypes.Structure):
    """Where rows that peers read lie, in words of 4 bytes from the beginning of the registered memory."""

    _fields_ = [
        ("rows", ctypes.c_uint32),
        ("beside", ctypes.c_uint32),
        ("row_words", ctypes.c_uint32),
        ("beside_words", ctypes.c_uint32),
    ]


class PlanFlag(enum.IntEnum):
    """What every rank must say alike of a call, beside its sizes (include/deep_ep/wire/plan.cuh)."""

    WEIGHTS = 1
    CACHED = 2
    SCALES = 4
    EVERY_ROW = 8
    IN_PLACE = 16
    CPU_SYNC = 32


def pointer(tensor: torch.Tensor | None) -> int | None:
    """What an argument holds for an optional tensor."""
    return None if tensor is None else tensor.data_ptr()
