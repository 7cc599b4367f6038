"""Ranks that do not do as their peers do: everybody is told, in every schedule, and under the race detector."""

from __future__ import annotations

import pytest
import torch

from tests.sim import mishaps

NUM_SEEDS, NUM_RACE_SEEDS, CHUNK = 2 * len(mishaps.PAIRS), len(mishaps.RACE_PAIRS), 16


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    torch.set_num_threads(1)  # the ranks are threads already


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, CHUNK))
def test_everybody_is_told(first: int) -> None:
    """A failure ends with the command that replays its seed."""
    for seed in range(first, first + CHUNK):
        mishaps.run_seed(seed, race=False)


@pytest.mark.race
@pytest.mark.parametrize("first", range(0, NUM_RACE_SEEDS, CHUNK))
def test_without_races(first: int) -> None:
    for seed in range(first, first + CHUNK):
        mishaps.run_seed(seed, race=True)


def test_the_draw_covers_what_it_should() -> None:
    drawn = [mishaps.Mishap.draw(seed, race=False) for seed in range(NUM_SEEDS)]
    racing = [mishaps.Mishap.draw(seed, race=True) for seed in range(NUM_RACE_SEEDS)]
    for some, pairs in ((drawn, mishaps.PAIRS), (racing, mishaps.RACE_PAIRS)):
        everything = {(mishaps.USUALS[usual], difference) for usual, difference in pairs}
        assert {(mishap.usual, mishap.difference) for mishap in some} == everything
        assert {usual for usual, _ in pairs} == set(mishaps.USUALS)
        assert {difference for _, difference in pairs} >= set(mishaps.DIFFERENCES) - {"one by one", "added first"}
        assert {mishap.do_cpu_sync for mishap in some} == {mishap.expand for mishap in some} == {False, True}
    assert {2, 3, 4, 8} == {mishap.num_ranks for mishap in drawn}
    assert {2, 3} == {mishap.num_ranks for mishap in racing}


def test_what_goes_unnoticed_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mishaps, "play", lambda mishap, *_: [""] * mishap.num_ranks)
    with pytest.raises(
        AssertionError, match=r"(?s)rank \d was told ''.*replay: python -m tests.sim.mishaps --seeds 3:4$"
    ):
        mishaps.run_seed(3, race=False)
