"""Readings of benchmarks that nobody has measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.ceilings import Ceilings
from benchmarks.report import Reading
from benchmarks.timing import MODES

FACTS = {"device": "Made Up", "ranks": 2, "hidden": 7168, "topk": 8, "experts": 256, "link_gbs": 361.0}
CEILINGS = Ceilings(360.0, 4000.0, launch_us=dict.fromkeys(MODES, 2.0), latency_us={"eager": 6.0, "graph": 4.0})


def reading(median: float = 150.0, **changes: Any) -> Reading:
    known = {"name": "dispatch", "tokens": 4096, "mode": "eager", "sms": 24, "rank": 0, "link_bytes": 36_000_000}
    known |= {"ceiling": 100.0, "floor": 106.0, "host": 80.0, "host_async": 70.0}
    return replace(Reading.of([0.9 * median, median, 1.1 * median], **known), **changes)


def both(first: Reading, factor: float = 1.01) -> list[Reading]:
    """Of two ranks."""
    return [first, replace(first, rank=1, median=first.median * factor)]


RUN = [
    both(reading()),
    both(reading(140.0, sms=48)),
    both(reading(20.0, name="combine", tokens=128, mode="graph", floor=8.0)),
    both(reading(4.4, name="barrier", tokens=0, mode="graph", sms=1, link_bytes=0, ceiling=0.0, floor=2.0, host=None)),
]
