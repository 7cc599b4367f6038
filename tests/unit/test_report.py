"""What a benchmark says of its times."""

from __future__ import annotations

import pytest

from benchmarks.report import Reading


@pytest.mark.parametrize(
    ("times", "expected"), [([5.0], (5, 5, 5)), ([1.0, 3.0], (0.5, 2, 3.5)), ([1.0, 2.0, 3.0], (1, 2, 3))]
)
def test_quartiles(times: list[float], expected: tuple[float, float, float]) -> None:
    """Of one time too: --iterations 1."""
    known = {"name": "dispatch", "tokens": 8, "mode": "eager", "sms": 4, "rank": 0}
    reading = Reading.of(times, **known, link_bytes=1000, ceiling=1.0, host=1.0)
    assert (reading.low, reading.median, reading.high) == expected
