"""A barrier orders what ranks did before it with what they do after it, in every schedule."""

from __future__ import annotations

import pytest
import torch

from tests.sim import barriers

NUM_SEEDS, NUM_RACE_SEEDS = 40, 16


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    torch.set_num_threads(1)  # the ranks are threads already


def test_everything_before_it_comes_before_everything_behind_it() -> None:
    """A failure ends with the command that replays its seed."""
    for seed in range(NUM_SEEDS):
        barriers.run_seed(seed, race=False)


@pytest.mark.race
def test_without_races() -> None:
    for seed in range(NUM_RACE_SEEDS):
        barriers.run_seed(seed, race=True)
