"""What is timed: one rank's random inputs, a buffer that they fit into, and the calls by their names."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

import deep_ep
from deep_ep.layout import LINE_BYTES
from deep_ep.sm_model import Kind
from deep_ep.utils import per_token_cast_to_fp8

REGISTERED_BESIDE = 1 << 20  # bytes, for what lies beside the rows of a call
ALIGNMENT = 128  # of the expanded layout, as grouped GEMMs of FP8 want it


def join(module: str) -> tuple[dist.ProcessGroup, torch.device]:
    """Join the ranks of a torchrun job, a GPU each; or end with how to start ``module``."""
    if "RANK" not in os.environ or torch.cuda.device_count() == 0:
        sys.exit(f"{module} needs GPUs, and a rank for each: torchrun --standalone --nproc-per-node 2 -m {module}")
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    group = dist.group.WORLD
    assert group is not None
    return group, device


@dataclass(frozen=True)
class Shape:
    """Of a batch: the same on all ranks."""

    tokens: int
    hidden: int
    topk: int
    experts: int

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--hidden", type=int, default=7168)
        parser.add_argument("--topk", type=int, default=8)
        parser.add_argument("--experts", type=int, default=256)

    @staticmethod
    def of(arguments: argparse.Namespace, tokens: int) -> Shape:
        return Shape(tokens, arguments.hidden, arguments.topk, arguments.experts)

    def build(self, group: dist.ProcessGroup) -> deep_ep.ElasticBuffer:
        """A buffer for batches of this shape, or of fewer tokens."""
        return deep_ep.ElasticBuffer(
            group,
            num_max_tokens_per_rank=self.tokens,
            hidden=self.hidden,
            num_topk=self.topk,
            explicitly_destroy=True,
            num_registered_bytes=2 * self.hidden * self.tokens * group.size() + REGISTERED_BESIDE,
        )


_ARENAS: weakref.WeakKeyDictionary[deep_ep.ElasticBuffer, torch.Tensor] = weakref.WeakKeyDictionary()


def registered(buffer: deep_ep.ElasticBuffer, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Copies in the buffer's registered memory, which one call has for itself at a time."""
    if buffer not in _ARENAS:
        _ARENAS[buffer] = buffer.registered_empty([buffer._end().layout["registered"].num_bytes], torch.uint8)
    copies, begin = [], 0
    for tensor in tensors:
        end = begin + tensor.numel() * tensor.element_size()
        copies.append(_ARENAS[buffer][begin:end].view(tensor.dtype).view(tensor.shape).copy_(tensor))
        begin = -(-end // LINE_BYTES) * LINE_BYTES
    return tuple(copies)


class Workload:
    """Random tokens, in bfloat16 and FP8, and their routes."""

    def __init__(self, shape: Shape, buffer: deep_ep.ElasticBuffer, device: torch.device) -> None:
        self.shape, self.buffer = shape, buffer
        torch.manual_seed(buffer.rank_idx)
        self.x = torch.randn(shape.tokens, shape.hidden, device=device).bfloat16()
        self.x8 = per_token_cast_to_fp8(self.x)
        scores = torch.rand(shape.tokens, shape.experts, device=device)
        self.weights, self.topk_idx = scores.topk(shape.topk, dim=1)
        per_rank = shape.experts // buffer.num_ranks
        ranks = torch.where(self.topk_idx >= 0, self.topk_idx // per_rank, -1)
        going = torch.stack([(ranks == rank).any(dim=1) for rank in range(buffer.num_ranks)])
        self.rows_sent = int(going.sum() - going[buffer.rank_idx].sum())

    def dispatch(self, num_sms: int, x: Any = None, **changes: Any) -> Any:
        """By default what the tables call a dispatch: FP8, no CPU sync."""
        arguments = {
            "topk_idx": self.topk_idx,
            "topk_weights": self.weights,
            "num_experts": self.shape.experts,
            "num_max_tokens_per_rank": self.shape.tokens,
            "do_cpu_sync": False,
            **changes,
        }
        return self.buffer.dispatch(self.x8 if x is None else x, num_sms=num_sms, **arguments)

    def by_handle(self, num_sms: int, handle: Any, **changes: Any) -> Any:
        return self.buffer.dispatch(self.x8, topk_weights=self.weights, handle=handle, num_sms=num_sms, **changes)


@dataclass(frozen=True)
class Timed:
    """A call that is timed. ``prepare(workload, num_sms)`` makes what it needs and returns it ready to be called."""

    prepare: Callable[[Workload, int], Callable[[], Any]]
    kind: Kind
    is_fp8: bool
    captures: bool = True  # whether a CUDA graph can hold it

    def link_bytes(self, workload: Workload) -> int:
        """Of rows and scale factors, that this rank sends to its peers."""
        hidden = workload.shape.hidden
        return workload.rows_sent * (hidden + hidden // 128 * 4 if self.is_fp8 else 2 * hidden)


def _dispatch(**changes: Any) -> Callable[[Workload, int], Callable[[], Any]]:
    return lambda workload, num_sms: functools.partial(workload.dispatch, num_sms, **changes)


def _bf16(workload: Workload, num_sms: int) -> Callable[[], Any]:
    return functools.partial(workload.dispatch, num_sms, workload.x)


def _in_place(workload: Workload, num_sms: int) -> Callable[[], Any]:
    x8 = registered(workload.buffer, *workload.x8)
    return functools.partial(workload.dispatch, num_sms, x8, zero_copy=True)


def _cached(**changes: Any) -> Callable[[Workload, int], Callable[[], Any]]:
    def prepare(workload: Workload, num_sms: int) -> Callable[[], Any]:
        handle = workload.dispatch(num_sms, expert_alignment=ALIGNMENT)[3]
        return functools.partial(workload.by_handle, num_sms, handle, **changes)

    return prepare


def _combine(*, expanded: bool = False, in_place: bool = False) -> Callable[[Workload, int], Callable[[], Any]]:
    """Of rows in exact sizes, as a layer that has waited for them, or of the worst case, has them."""

    def prepare(workload: Workload, num_sms: int) -> Callable[[], Any]:
        handle = workload.dispatch(num_sms, expert_alignment=ALIGNMENT, do_expand=expanded, do_cpu_sync=True)[3]
        rows = handle.num_expanded_tokens if expanded else handle.num_recv_tokens
        y = torch.randn(rows, workload.shape.hidden, device=workload.x.device).bfloat16()
        if in_place:
            (y,) = registered(workload.buffer, y)
        return functools.partial(workload.buffer.combine, y, handle, num_sms=num_sms, zero_copy=in_place)

    return prepare


EXPANDED = {"do_expand": True, "expert_alignment": ALIGNMENT}
CALLS = {
    "dispatch": Timed(_dispatch(), Kind.DISPATCH, is_fp8=True),
    "dispatch, cached": Timed(_cached(), Kind.DISPATCH, is_fp8=True),
    "dispatch, expanded": Timed(_dispatch(**EXPANDED), Kind.EXPANDED_DISPATCH, is_fp8=True),
    "dispatch, cached expanded": Timed(_cached(do_expand=True), Kind.EXPANDED_DISPATCH, is_fp8=True),
    "dispatch, CPU sync": Timed(_dispatch(do_cpu_sync=True), Kind.DISPATCH, is_fp8=True, captures=False),
    "dispatch, in place": Timed(_in_place, Kind.DISPATCH_IN_PLACE, is_fp8=True),
    "dispatch bf16": Timed(_bf16, Kind.DISPATCH, is_fp8=False),
    "combine": Timed(_combine(), Kind.COMBINE, is_fp8=False),
    "combine, in place": Timed(_combine(in_place=True), Kind.COMBINE_IN_PLACE, is_fp8=False),
    "combine, expanded": Timed(_combine(expanded=True), Kind.COMBINE_OF_SUMS, is_fp8=False),
}
