"""Calls that are queued behind one that fails, as without CPU sync and in CUDA graphs: they must not go by what it has
left, which is anything."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import deep_ep
from deep_ep import EPError, EPTimeoutError, jit
from deep_ep.calls.expected import Expected, Room
from deep_ep.calls.received import Sizes
from deep_ep.machine.world import World
from tests.sim import bugs, planted
from tests.sim.ranks import Buffer, Group, Ranks, Settings
from tests.sim.swarm import ROLES

TOKENS, HIDDEN, EXPERTS = 6, 64, 4
ANYTHING = (0x12345678, -1, 0)  # what fresh memory may hold
AN_EXPERT = EXPERTS - 1  # what it holds where selections go: by anything else, nobody would look at the rest


def call_all(buffer: Buffer, num_max_tokens: int, expanded: bool) -> None:
    """A dispatch, one by its handle, and a combine, before any of them has run."""
    x = torch.ones(TOKENS, HIDDEN, dtype=torch.bfloat16)
    idx = (torch.arange(2 * TOKENS).reshape(TOKENS, 2) % EXPERTS).to(deep_ep.topk_idx_t)
    sizes: dict[str, Any] = {"num_experts": EXPERTS, "num_max_tokens_per_rank": num_max_tokens}
    handle = buffer.dispatch(x, topk_idx=idx, do_cpu_sync=False, **sizes)[3]
    rows = buffer.dispatch(x, handle=handle, do_expand=expanded)[0]
    assert isinstance(rows, torch.Tensor)
    buffer.combine(torch.ones_like(rows), handle)


def play(toolchain: jit.Gxx, expanded: bool, second_comes: bool) -> list[str]:
    """What two ranks are told, of which the second makes other calls or none."""
    told = ["", ""]

    def program(group: Group) -> None:
        buffer = Buffer(group, num_max_tokens_per_rank=24, hidden=HIDDEN, num_gpu_timeout_secs=7)
        buffer.overlaps = True
        if group.rank() == 0 or second_comes:
            call_all(buffer, 24 - 8 * group.rank(), expanded)
        buffer.run()
        try:
            buffer.get_comm_stream()
        except EPError as error:
            told[group.rank()] = str(error)

    with World() as world:
        Ranks(world, 2, Settings(toolchain, 1 << 16, (3, 3), {}, "expire")).run(ROLES[0], program)
    return told


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    torch.set_num_threads(1)  # the ranks are threads already


@pytest.fixture(params=ANYTHING, ids=hex)
def _fresh_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a dispatch is to write places and counts, there is something already; and where it keeps selections, which
    it may do or not before it fails."""
    contents = {torch.int32: request.param, torch.int64: AN_EXPERT}

    def filling(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def filled(*like: Any, **how: Any) -> torch.Tensor:
            tensor = allocate(*like, **how)
            return tensor.fill_(contents[tensor.dtype]) if tensor.dtype in contents else tensor

        return filled

    monkeypatch.setattr(torch.Tensor, "new_empty", filling(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", filling(torch.empty_like))


@pytest.mark.usefixtures("_fresh_memory")
@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("second_comes", [False, True])
def test_only_the_failure_is_told(expanded: bool, second_comes: bool) -> None:
    first, second = play(jit.Gxx(), expanded, second_comes)
    if second_comes:
        assert "made this call with num_max_tokens_per_rank 16, rank 0 with 24" in first
        assert "made this call with num_max_tokens_per_rank 24, rank 1 with 16" in second
    else:
        assert "rank 0 waited 7.0 s in " in first
        assert second == ""


@pytest.mark.parametrize("num_sms", [1, 3])
@pytest.mark.parametrize("zero_copy", [False, True])
def test_the_operation_ends_without_the_launch_that_does_not_come(num_sms: int, zero_copy: bool) -> None:
    """Where no counts come, the host launches no receivers; a graph's replays must find the buffer broken all the
    same."""
    words: list[int] = []

    def program(group: Group) -> None:
        sizes = {"num_max_tokens_per_rank": 24, "hidden": HIDDEN, "num_registered_bytes": 1 << 16}
        buffer = Buffer(group, **sizes, num_gpu_timeout_secs=7)
        if group.rank() == 1:
            buffer.run()
            return
        x = buffer.registered_empty((TOKENS, HIDDEN), torch.bfloat16)
        idx = torch.zeros(TOKENS, 1, dtype=deep_ep.topk_idx_t)
        with pytest.raises(EPTimeoutError):
            buffer.dispatch(x, topk_idx=idx, num_experts=EXPERTS, zero_copy=zero_copy)
        own = group.machine._windows[0].addresses[0]
        words.extend(struct.unpack("=6I", world.read(own, 24)))

    with World() as world:
        Ranks(world, 2, Settings(jit.Gxx(), 1 << 16, (num_sms,) * 2, {}, "expire")).run(ROLES[0], program)
    epoch, blocks_done, *_, broken = words
    assert (epoch, blocks_done) == (1, 0)
    assert broken


ALL = Sizes(2 * TOKENS, 4 * TOKENS)
ROOMS = {"none": None, "enough": Room(ALL, Sizes(0, 0)), "too little": Room(Sizes(1, 1), Sizes(0, 0))}


@pytest.mark.parametrize("num_sms", [1, 3])
@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("room", ROOMS)
def test_the_operation_ends_once_though_nothing_comes_after_the_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: str, expanded: bool, num_sms: int
) -> None:
    """Whether those who wait for rows in vain are of the first launch or of a second one."""
    windows: list[int] = []
    no_marks = bugs.Bug("no-marks", "phases/announce.cuh", "if (slot_of_lane >= 0)", "if (false)", "")
    monkeypatch.setattr(Expected, "room", lambda self, expand: ROOMS[room])

    def program(group: Group) -> None:
        buffer = Buffer(group, num_max_tokens_per_rank=24, hidden=HIDDEN, num_gpu_timeout_secs=7)
        x = torch.ones(TOKENS, HIDDEN, dtype=torch.bfloat16)
        idx = (torch.arange(2 * TOKENS).reshape(TOKENS, 2) % EXPERTS).to(deep_ep.topk_idx_t)
        buffer.dispatch(x, topk_idx=idx, num_experts=EXPERTS, do_expand=expanded)
        buffer.run()
        with pytest.raises(EPTimeoutError, match=r"rank \d waited"):
            buffer.get_comm_stream()
        windows.append(group.machine._windows[0].addresses[group.rank()])

    with World() as world:
        toolchain = planted.patched_toolchain(tmp_path, replace(no_marks, race_detector=False))
        Ranks(world, 2, Settings(toolchain, 1 << 16, (num_sms,) * 2, {}, "expire")).run(ROLES[0], program)
        words = [struct.unpack("=6I", world.read(window, 24)) for window in windows]
    assert len(words) == 2
    for epoch, blocks_done, *_, broken in words:
        assert (epoch, blocks_done) == (1, 0)
        assert broken


@pytest.mark.usefixtures("_fresh_memory")
@pytest.mark.parametrize("_fresh_memory", ANYTHING[:1], indirect=True)
def test_who_goes_on_crashes(tmp_path: Path) -> None:
    """The planted bug: a combine that does not look whether the buffer is broken."""
    gone = "  if (is_void) return;\n"
    bug = bugs.Bug("goes-on", "kernels/combine.cuh", gone, "", "", race_detector=False)
    with pytest.raises(
        EPError, match=r"simulated launch failed with seed \d+: (crash|an access to .* no memory of this world)"
    ):
        play(planted.patched_toolchain(tmp_path, bug), expanded=True, second_comes=True)
