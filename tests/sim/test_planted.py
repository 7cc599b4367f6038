"""Each planted bug must be noticed within a few seeds; the unpatched copy must not be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deep_ep.jit.toolchain import INCLUDE_DIR
from tests.elastic import combines
from tests.sim import bugs, planted, swarm

pytestmark = pytest.mark.race

NUM_CONTROLS = 12  # stories without a bug; tests/sim/test_swarm.py tells many more


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("bug", bugs.BUGS, ids=lambda bug: bug.name)
def test_is_noticed(bug: bugs.Bug) -> None:
    num_seeds, error = planted.plant(bug)
    assert error, f"nothing noticed {bug.name} in {num_seeds} seeds; python -m tests.sim.planted {bug.name}"
    assert bug.noticed_by in error, error


@pytest.mark.parametrize(
    ("num_tokens", "combining", "num_sms", "do_cpu_sync"),
    dict.fromkeys((bug.num_tokens, bug.combining, bug.num_sms, bug.do_cpu_sync) for bug in bugs.BUGS),
)
def test_nothing_is_noticed_where_nothing_is_planted(
    tmp_path: Path, num_tokens: int, combining: combines.Options, num_sms: int, do_cpu_sync: bool
) -> None:
    toolchain = planted.patched_toolchain(tmp_path, None)
    found = planted.find_error(toolchain, num_tokens, combining, num_sms, do_cpu_sync, NUM_CONTROLS)
    assert found == (NUM_CONTROLS, "")


@pytest.mark.parametrize("bug", [bug for bug in bugs.BUGS if bug.beside], ids=lambda bug: bug.name)
def test_what_makes_a_bug_show_is_none(tmp_path: Path, bug: bugs.Bug) -> None:
    toolchain = planted.patched_toolchain(tmp_path, replace(bug, new=bug.old))
    found = planted.find_error(toolchain, bug.num_tokens, bug.combining, bug.num_sms, bug.do_cpu_sync, NUM_CONTROLS)
    assert found == (NUM_CONTROLS, "")


@pytest.mark.parametrize("race", [False, True])
def test_labels_may_come_late(tmp_path: Path, race: bool) -> None:
    """As on GPUs: whoever wants them waits for them, in any layout, at any size."""
    late = next(bug for bug in bugs.BUGS if bug.beside == bugs.LATE_LABELS)
    toolchain = planted.patched_toolchain(tmp_path, replace(late, new=late.old, race_detector=race))
    for seed in range(NUM_CONTROLS):
        swarm.run_seed(seed, race, toolchain)


def test_every_phase_has_a_bug() -> None:
    """A new header of a phase comes with a bug that only its own lines prevent."""
    phases = {f"phases/{path.name}" for path in (INCLUDE_DIR / "deep_ep" / "phases").glob("*.cuh")}
    assert phases - {bug.file for bug in bugs.BUGS} == {"phases/tables.cuh"}, "which only says where things are"


def test_a_patch_that_no_longer_fits_is_an_error(tmp_path: Path) -> None:
    bug = bugs.Bug("gone", "phases/ring.cuh", "no such text", "", "")
    with pytest.raises(ValueError, match=r"gone: this stands 0 times in phases/ring\.cuh, not 1"):
        planted.patched_toolchain(tmp_path, bug)
