"""The race detector: silent on what is right, and on each planted bug a report that names the kernel's line."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import numpy as np
import pytest

from deep_ep.machine.world import SimulationError, World
from tests.device.bench import Probe, SimulatedBench
from tests.device.conftest import WorldKeeper
from tests.device.exchange import Exchange

pytestmark = pytest.mark.race

BUGS = [
    "EP_BUG_NO_PROXY_FENCE",
    "EP_BUG_NO_BULK_WAIT",
    "EP_BUG_NO_READ_WAIT",
    "EP_BUG_NO_MBARRIER_WAIT",
    "EP_BUG_NO_SYNC_WARP",
    "EP_BUG_RELAXED",
]


def find_race(run_seed: Callable[[int], object]) -> str:
    """Run seeds until one fails; returns its report."""
    with pytest.raises(SimulationError) as caught:  # noqa: PT012 (which seed it is, nobody knows before)
        for seed in range(10):
            run_seed(seed)
    assert f"seed {caught.value.seed}" in str(caught.value)
    return caught.value.report


def test_silent_on_a_correct_exchange(race_worlds: WorldKeeper, record_property: Callable[[str, object], None]) -> None:
    exchange = Exchange(race_worlds.get())
    exchange.run(seed=0)  # creates the fibers
    start = time.perf_counter()
    for seed in range(1, 21):
        exchange.run(seed)
    milliseconds = (time.perf_counter() - start) / 20 * 1e3
    record_property(
        "measured", f"exchange, 2 ranks x 2 blocks x 64 threads, race detector: {milliseconds:.1f} ms a seed"
    )


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_in_the_exchange(bug: str) -> None:
    with World(race_detector=True) as world:
        exchange = Exchange(world, bug)
        report = find_race(exchange.run)
        assert "data race" in report
        assert re.search(r"exchange\.cuh:\d+", report)
        assert re.search(r"by (rank \d block \d thread \d+|copy engine of rank \d block \d)", report)
        assert not world.is_alive


def test_a_relaxed_message_is_a_race() -> None:
    words = [np.zeros(32, np.uint32)] * 2
    with World(race_detector=True) as world:
        bench = SimulatedBench(world)
        report = find_race(
            lambda seed: bench.run(Probe("message", words, 32, variant=7, count=1, num_blocks=2, seed=seed))
        )
        assert "message.cuh" in report


def test_what_was_acquired_needs_a_fence_before_a_copy() -> None:
    words = [np.zeros(128, np.uint32)] * 2
    with World(race_detector=True) as world:
        bench = SimulatedBench(world, defines=("EP_BUG_NO_GLOBAL_FENCE",))
        report = find_race(
            lambda seed: bench.run(Probe("relay", words, 128, num_blocks=2, shared_bytes=1024, seed=seed))
        )
        assert "relay.cuh" in report


def test_too_many_threads_are_refused(race_worlds: WorldKeeper) -> None:
    words = [np.zeros(1, np.uint32)] * 16
    probe = Probe("barriers", words, 1, variant=2, num_blocks=2, num_threads=256, window_bytes=4096)
    with pytest.raises(ValueError, match="needs 8512 fibers; the race detector has room for 7800"):
        SimulatedBench(race_worlds.get()).run(probe)
