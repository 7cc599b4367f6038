"""How every benchmark here measures: both ranks aligned on the GPU, L2 flushed, the host far ahead."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

import deep_ep

FLUSH_BYTES = 512 << 20  # several times any L2
FLUSHES = 8  # about a millisecond, in which the host enqueues the whole call


class Stopwatch:
    """Times calls on the current stream by events: from inputs ready to outputs ready."""

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        self._small = torch.zeros(1, device=device)

    def times(self, call: Callable[[], Any], iterations: int) -> list[float]:
        """Microseconds of each call, after three that are not counted. Collective."""
        for _ in range(3):
            call()
        return [self._time(call) for _ in range(iterations)]

    def _time(self, call: Callable[[], Any]) -> float:
        for _ in range(FLUSHES):
            self._flush.zero_()
        dist.all_reduce(self._small)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1000


@dataclass
class Workload:
    """One rank's random inputs, and a buffer that they fit into."""

    x: torch.Tensor
    topk_idx: torch.Tensor
    weights: torch.Tensor
    num_experts: int
    buffer: deep_ep.ElasticBuffer

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--tokens", type=int, default=4096)
        parser.add_argument("--hidden", type=int, default=7168)
        parser.add_argument("--topk", type=int, default=8)
        parser.add_argument("--experts", type=int, default=256)

    @staticmethod
    def make(arguments: argparse.Namespace) -> Workload:
        """Join the ranks of a torchrun job, draw inputs and build the buffer. Collective."""
        rank = int(os.environ["RANK"])
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
        group = dist.group.WORLD
        assert group is not None
        torch.manual_seed(rank)
        x = torch.randn(arguments.tokens, arguments.hidden, device=device).bfloat16()
        scores = torch.rand(arguments.tokens, arguments.experts, device=device)
        weights, topk_idx = scores.topk(arguments.topk, dim=1)
        buffer = deep_ep.ElasticBuffer(
            group, num_max_tokens_per_rank=arguments.tokens, hidden=arguments.hidden, num_topk=arguments.topk
        )
        return Workload(x, topk_idx, weights, arguments.experts, buffer)

    def dispatch(self, num_sms: int, sync: bool = False) -> Any:
        return self.buffer.dispatch(
            self.x,
            topk_idx=self.topk_idx,
            topk_weights=self.weights,
            num_experts=self.num_experts,
            num_sms=num_sms,
            do_cpu_sync=sync,
        )

    def close(self) -> None:
        self.buffer.destroy()
        dist.destroy_process_group()
