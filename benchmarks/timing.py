"""How every benchmark here measures: ranks aligned on the GPU, L2 flushed, the host far ahead; or in a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

FLUSH_BYTES = 512 << 20  # several times any L2
FLUSHES = 8  # about a millisecond, in which the host enqueues the whole call
WARM_UP = 3  # calls that are not counted
CALLS_OF_GRAPH = 20  # captured behind each other, so that what a replay costs by itself does not count
CALLS_OF_HOST = 100  # far below what a stream may hold back

Call = Callable[[], Any]


class Stopwatch:
    """Times calls on the current stream by events: from inputs ready to outputs ready. All methods are collective."""

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        self._small = torch.zeros(1, device=device)

    def eager(self, call: Call, iterations: int) -> list[float]:
        """Microseconds of each call by itself, L2 flushed before it."""
        for _ in range(WARM_UP):
            call()
        return [self._between_events(call, FLUSHES) for _ in range(iterations)]

    def graph(self, call: Call, iterations: int) -> list[float]:
        """Microseconds of a call in a CUDA graph: a replay of CALLS_OF_GRAPH of them, over their number."""
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS_OF_GRAPH):
                call()
        for _ in range(WARM_UP):
            graph.replay()
        times = [self._between_events(graph.replay, 1) / CALLS_OF_GRAPH for _ in range(iterations)]
        torch.cuda.synchronize()
        graph.reset()
        return times

    def host(self, call: Call) -> float:
        """Microseconds that the host spends on a call, while nothing holds it back."""
        for _ in range(WARM_UP):
            call()
        torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        for _ in range(CALLS_OF_HOST):
            call()
        spent = time.perf_counter() - start
        torch.cuda.synchronize()
        return spent / CALLS_OF_HOST * 1e6

    def _between_events(self, call: Call, flushes: int) -> float:
        for _ in range(flushes):
            self._flush.zero_()
        dist.all_reduce(self._small)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1000
