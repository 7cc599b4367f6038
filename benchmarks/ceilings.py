"""What the hardware gives, measured in the same run as everything else."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch

import deep_ep
from benchmarks.timing import MODES, Call, Stopwatch

COPY_BYTES = 48 << 20
LOOKS = 3


@dataclass(frozen=True)
class Ceilings:
    """What no call can beat, on this host and in this run.

    A call's floor is one round of all ranks and then its bytes on the link. The round is this package's own barrier, a
    launch of one warp and one exchange of words: kernels that must hear of each other do not begin or end with less. So
    decode figures (all latency) and prefill figures (all bandwidth) are measured by one rule, and a faster or slower
    host moves both sides of the ratio. That the barrier itself has not become slower is seen by ``launch_us``, in which
    there is nothing of ours.
    """

    link_gbs: float
    """By the copy engine, over the link with all ranks sending at once."""
    memory_gbs: float
    """By the copy engine, counting what is read and what is written."""
    launch_us: dict[str, float]
    """By mode (timing.MODES): a kernel of torch that adds 1 to a number."""
    latency_us: dict[str, float]
    """By mode: a barrier of all ranks."""

    @staticmethod
    def measure(buffer: deep_ep.ElasticBuffer, stopwatch: Stopwatch, iterations: int) -> Ceilings:
        """Collective. The buffer's window must hold COPY_BYTES. Of several looks by turns the least disturbed counts: a
        floor that is too high hides slower calls, and in a reference it makes others fail."""
        here = torch.empty(1 << 30, dtype=torch.uint8, device=torch.device("cuda", torch.cuda.current_device()))
        number = torch.zeros(1, device=here.device)
        calls: dict[tuple[str, str], Call] = {
            ("link", "eager"): lambda: copy_to_peer(buffer),
            ("memory", "eager"): here.clone,
            **{("launch", mode): lambda: number.add_(1) for mode in MODES},
            **{("latency", mode): lambda: barrier(buffer) for mode in MODES},
        }
        us = dict.fromkeys(calls, math.inf)
        for _ in range(LOOKS):
            for (name, mode), call in calls.items():
                us[name, mode] = min(us[name, mode], statistics.median(stopwatch.times(mode, call, iterations)))
        return Ceilings(
            link_gbs=COPY_BYTES / us["link", "eager"] / 1e3,
            memory_gbs=2 * here.numel() / us["memory", "eager"] / 1e3,
            launch_us={mode: us["launch", mode] for mode in MODES},
            latency_us={mode: us["latency", mode] for mode in MODES},
        )

    def link_us(self, link_bytes: int) -> float:
        """What so many bytes take on the link."""
        return link_bytes / self.link_gbs / 1e3

    def floor_us(self, link_bytes: int, mode: str) -> float:
        """What a call takes at least that sends so many bytes."""
        return self.latency_us[mode] + self.link_us(link_bytes)


def barrier(buffer: deep_ep.ElasticBuffer) -> None:
    """A meeting of all ranks on their current streams."""
    buffer.barrier(use_comm_stream=False)


def copy_to_peer(buffer: Any) -> None:
    """From this rank's window to the next rank's."""
    from cuda.bindings import driver

    addresses, rank = buffer._endpoint.window.addresses, buffer.rank_idx
    offset = buffer._endpoint.layout["rows"].offset
    source, target = addresses[rank] + offset, addresses[(rank + 1) % len(addresses)] + offset
    (status,) = driver.cuMemcpyDtoDAsync(target, source, COPY_BYTES, torch.cuda.current_stream().cuda_stream)
    assert int(status) == 0, status
