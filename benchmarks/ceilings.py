"""What the hardware gives, measured in the same run as everything else."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch

import deep_ep
from benchmarks.timing import Stopwatch

COPY_BYTES = 48 << 20


@dataclass(frozen=True)
class Ceilings:
    """GB/s that the copy engine reaches: over the link with all ranks sending at once; in memory, counting what is read
    and what is written."""

    link_gbs: float
    memory_gbs: float

    @staticmethod
    def measure(buffer: deep_ep.ElasticBuffer, stopwatch: Stopwatch, iterations: int) -> Ceilings:
        """Collective. The buffer's window must hold COPY_BYTES."""
        here = torch.empty(1 << 30, dtype=torch.uint8, device=torch.device("cuda", torch.cuda.current_device()))
        link = statistics.median(stopwatch.eager(lambda: copy_to_peer(buffer), iterations))
        memory = statistics.median(stopwatch.eager(here.clone, iterations))
        return Ceilings(COPY_BYTES / link / 1e3, 2 * here.numel() / memory / 1e3)


def copy_to_peer(buffer: Any) -> None:
    """From this rank's window to the next rank's."""
    from cuda.bindings import driver

    addresses, rank = buffer._endpoint.window.addresses, buffer.rank_idx
    offset = buffer._endpoint.layout["rows"].offset
    source, target = addresses[rank] + offset, addresses[(rank + 1) % len(addresses)] + offset
    (status,) = driver.cuMemcpyDtoDAsync(target, source, COPY_BYTES, torch.cuda.current_stream().cuda_stream)
    assert int(status) == 0, status
