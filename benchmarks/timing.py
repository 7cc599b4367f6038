"""How every benchmark here measures: ranks aligned on the GPU, L2 flushed, the host far ahead; or in a CUDA graph."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import DeviceType

MODES = ("eager", "graph")
FLUSH_BYTES = 512 << 20  # several times any L2
FLUSHES = 8  # about a millisecond, in which the host enqueues the whole call
WARM_UP = 3  # calls that are not counted
CALLS_OF_GRAPH = 20  # captured behind each other, so that what a replay costs by itself does not count
CALLS_OF_HOST = 100  # far below what a stream may hold back
PROFILED = 5  # calls, or replays of a graph, under the profiler

OURS = "deep_ep_"  # how the names of this package's kernels begin (deep_ep/jit/source.py)

Call = Callable[..., Any]


class Stopwatch:
    """Times calls on the current stream by events: from inputs ready to outputs ready. All methods are collective."""

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        self._small = torch.zeros(1, device=device)

    def times(self, mode: str, call: Call, iterations: int) -> list[float]:
        return (self.graph if mode == "graph" else self.eager)(call, iterations)

    def eager(self, call: Call, iterations: int) -> list[float]:
        """Microseconds of each call by itself, L2 flushed before it."""
        for _ in range(WARM_UP):
            call()
        return [self._between_events(call, FLUSHES) for _ in range(iterations)]

    def graph(self, call: Call, iterations: int) -> list[float]:
        """Microseconds of a call in a CUDA graph: a replay of CALLS_OF_GRAPH of them, over their number."""
        with self._captured(call) as replay:
            return [self._between_events(replay, 1) / CALLS_OF_GRAPH for _ in range(iterations)]

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

    def kernels(self, mode: str, call: Call) -> list[float]:
        """Microseconds of each of this package's kernels in a call, by the profiler. Whatever is timed after this may
        be slower: the profiler does not quite let go of the driver."""
        if mode == "graph":
            with self._captured(call) as replay:
                return self._profiled(replay, 1, CALLS_OF_GRAPH)
        for _ in range(WARM_UP):
            call()
        return self._profiled(call, FLUSHES, 1)

    def _profiled(self, call: Call, flushes: int, calls_in_one: int) -> list[float]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(PROFILED):
                self._between_events(call, flushes)
        on_gpu = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
        seen = [(event.name, event.time_range.start, event.time_range.elapsed_us()) for event in on_gpu]
        return kernel_times(seen, PROFILED * calls_in_one)

    @contextlib.contextmanager
    def _captured(self, call: Call) -> Iterator[Call]:
        """The replay of a graph of CALLS_OF_GRAPH calls."""
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS_OF_GRAPH):
                call()
        for _ in range(WARM_UP):
            graph.replay()
        yield graph.replay
        torch.cuda.synchronize()
        graph.reset()

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


def kernel_times(seen: list[tuple[str, float, float]], num_calls: int) -> list[float]:
    """Medians over equal calls of the microseconds that each kernel of this package took, in the order of launches.

    Args:
        seen: (name, start, microseconds) of whatever ran on the GPU, in any order.

    Returns:
        nothing, if the kernels cannot be divided among the calls: the profiler has lost some.
    """
    ours = [took for _, took in sorted((start, took) for name, start, took in seen if name.startswith(OURS))]
    each, rest = divmod(len(ours), num_calls)
    return [] if rest else [statistics.median(ours[i::each]) for i in range(each)]
