"""Jobs made of scenes, each of which plays something that may happen, on GPUs or simulated ranks, and checks it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from deep_ep import ElasticBuffer, EventHandle
from tests.elastic import ranks
from tests.elastic.replays import Given, Shape, small

CYCLES_PER_SECOND = 2e9  # of a GPU, at most
SOON = 0.0005  # seconds
ODD = 1  # the rank that does otherwise, where one does
REPLAYS = {"cuda": 3000, "cpu": 6}


@dataclass(frozen=True)
class Job:
    """This rank, and how often it replays a graph."""

    group: dist.ProcessGroup
    device: torch.device
    replays: int

    @property
    def is_odd(self) -> bool:
        """Whether this is the rank that does otherwise, where one does."""
        return self.group.rank() == ODD

    @property
    def on_gpus(self) -> bool:
        return self.device.type == "cuda"

    def build(self, **changes: Any) -> ElasticBuffer:
        settings = {"num_max_tokens_per_rank": 128, "hidden": 1024, "allow_multiple_reduction": False}
        return ElasticBuffer(self.group, **{**settings, **changes})

    def shape(self, **changes: Any) -> Shape:
        return small(self.group.size(), **changes)

    def wide(self, **changes: Any) -> Shape:
        """Enough tokens for many blocks, on GPUs."""
        size = {"tokens": (96,) * self.group.size(), "hidden": 1024, "num_topk": 8} if self.on_gpus else {}
        return self.shape(**{**size, **changes})

    def delay(self, seconds: float) -> None:
        """Keep the current stream busy, or the rank where there are no streams."""
        if self.on_gpus:
            torch.cuda._sleep(int(seconds * CYCLES_PER_SECOND))
        else:
            time.sleep(seconds)

    def streams(self, count: int) -> list[Any]:
        """New streams, which know what is queued on the current one; None each where there are none."""
        if not self.on_gpus:
            return [None] * count
        streams = [torch.cuda.Stream(self.device) for _ in range(count)]
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
        return streams

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Whatever is queued, is queued there."""
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    def later(self, seconds: float) -> EventHandle:
        """An event that happens after a while, on no stream that anybody uses."""
        if not self.on_gpus:
            return EventHandle.inert()
        with self.on(torch.cuda.Stream(self.device)):
            self.delay(seconds)
            return EventHandle()

    def slowly(self, given: Given) -> Given:
        """What is given, but only after a while: whoever does not wait reads something else."""
        self.delay(SOON)
        return given.copied()

    def seconds_of(self, action: Callable[[], Any]) -> float:
        """That what it does takes, on the current stream where there is one."""
        start_s = time.monotonic()
        if not self.on_gpus:
            action()
            return time.monotonic() - start_s
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        action()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000


def play(scenes: Sequence[Callable[[Job], None]], description: str | None) -> int:
    """A rank's main function: one scene after the other, all ranks together; says which went well, and how long each
    took."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--machine", choices=ranks.MACHINES, default="simulated")
    parser.add_argument("--replays", type=int, help=f"how often graphs are replayed; by device: {REPLAYS}")
    parser.add_argument("--only", help="the name of one scene")
    arguments = parser.parse_args()
    group, device = ranks.join(arguments.machine)
    if device.type == "cuda":  # so that no kernel of torch is loaded within a capture; ours are, when a buffer is built
        (torch.ones(8, dtype=torch.uint8, device=device).to(torch.bfloat16) * 2).clone()
    job = Job(group, device, arguments.replays or REPLAYS[device.type])
    for scene in scenes:
        if arguments.only in (None, scene.__name__):
            start_s = time.monotonic()
            scene(job)
            dist.barrier(group)
            if group.rank() == 0:
                print(f"{scene.__name__}: OK, {time.monotonic() - start_s:.1f} s", flush=True)
    dist.destroy_process_group()
    return 0
