"""A rank that comes when its peer has given up, and has other values where its rows were: it must not end well."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import deep_ep
from deep_ep import EPError, jit
from deep_ep.machine.world import World
from tests.sim import bugs, planted
from tests.sim.ranks import Buffer, Group, Ranks, Settings
from tests.sim.swarm import ROLES

TOKENS, HIDDEN, LATE, PATIENCE_S = 6, 64, 1, 7


def play(toolchain: jit.Gxx) -> tuple[list[str], torch.Tensor]:
    """What two ranks are told after a combine in place, to which the second comes late; and the late one's sums."""
    told, sums = ["", ""], [torch.empty(0)] * 2

    def program(group: Group) -> None:
        sizes = {"num_max_tokens_per_rank": TOKENS, "hidden": HIDDEN, "num_registered_bytes": 1 << 20}
        buffer = Buffer(group, **sizes, num_gpu_timeout_secs=PATIENCE_S)
        x = torch.ones(TOKENS, HIDDEN, dtype=torch.bfloat16)
        idx = torch.arange(2).expand(TOKENS, 2).to(deep_ep.topk_idx_t)  # an expert of each rank
        handle = buffer.dispatch(x, topk_idx=idx, num_experts=2)[3]
        y = buffer.registered_empty([handle.num_recv_tokens, HIDDEN]).fill_(1)
        buffer.overlaps = True
        if group.rank() == LATE:
            buffer.run()  # in which the other waits, gives up, and goes on
        sums[group.rank()] = buffer.combine(y, handle, zero_copy=True)[0]
        buffer.write_in_order(y, torch.zeros_like(y))
        buffer.run()
        if group.rank() != LATE:
            buffer.run()  # with nothing more to do
        try:
            buffer.get_comm_stream()
        except EPError as error:
            told[group.rank()] = str(error)

    with World() as world:
        Ranks(world, 2, Settings(toolchain, 1 << 16, (2, 2), {}, "expire")).run(ROLES[0], program)
    return told, sums[LATE]


def test_the_late_one_is_told() -> None:
    (first, late), _ = play(jit.Gxx())
    assert f"waited {PATIENCE_S}.0 s in agree: for rank {LATE}" in first
    assert "in await_readers: for rank 0 to have read" in late
    assert "has given up because this rank came too late" in late


def test_else_its_sums_are_wrong(tmp_path: Path) -> None:
    """The planted bug: who gave up leaves its mark."""
    bug = bugs.Bug(
        "mark-stays", "phases/retire.cuh", "if (kInPlace && gave_up != 0 &&", "if (false &&", "", race_detector=False
    )
    (first, late), sums = play(planted.patched_toolchain(tmp_path, bug))
    assert first
    assert late == ""
    assert not bool((sums == 2).all())


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    torch.set_num_threads(1)  # the ranks are threads already
