"""Dispatch, combine and round trips under many seeds, held against the oracle bit for bit."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from deep_ep import jit
from deep_ep.calls.expected import Expected
from deep_ep.calls.received import Sizes
from deep_ep.machine.world import World
from tests.elastic import cases, combines, rooms
from tests.sim import swarm

NUM_SEEDS, NUM_RACE_SEEDS = 320, 36
CHUNK, RACE_CHUNK = 16, 6  # seeds of one test


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    torch.set_num_threads(1)  # the ranks are threads already


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, CHUNK))
def test_any_schedule(first: int) -> None:
    """1 to 16 ranks. A failure ends with the command that replays its seed."""
    for seed in range(first, first + CHUNK):
        swarm.run_seed(seed, race=False)


@pytest.mark.race
@pytest.mark.parametrize("first", range(0, NUM_RACE_SEEDS, RACE_CHUNK))
def test_no_races(first: int) -> None:
    for seed in range(first, first + RACE_CHUNK):
        swarm.run_seed(seed, race=True)


def test_rooms_do_and_do_not() -> None:
    """For what comes, in one number, in both, in none."""
    coming, fitting = Sizes(5, 9), set()
    for seed in range(200):
        with rooms.drawn(str(seed), coming):
            room = Expected(Sizes(20, 50)).room(expand=True)
        fitting.add(
            room
            and (
                room.least.tokens <= coming.tokens,
                coming.tokens <= room.most.tokens,
                room.least.expanded <= coming.expanded,
                coming.expanded <= room.most.expanded,
            )
        )
    assert fitting >= {None, (True,) * 4, *itertools.permutations((False, True, True, True))}


def test_the_draw_covers_what_it_should() -> None:
    """Whoever changes how stories are drawn learns here what fell out."""
    stories = [swarm.Story.draw(seed, race=False) for seed in range(NUM_SEEDS)]
    drawn = [case for story in stories for case in story.cases]
    assert {1, 2, 3, 4, 8, 16} <= {story.num_ranks for story in stories}
    assert {story.roles for story in stories} == set(swarm.ROLES)
    assert {"random", "holes", "skewed", "masked", "twice", "outside"} == {case.kind for case in drawn}
    assert {1, 2, 8, 32} <= {case.num_topk for case in drawn}
    assert {0, 1, 2} == {case.num_biases for case in drawn}
    assert {case.exact_sizes for case in drawn} == {case.with_weights for case in drawn} == {False, True}
    flags = set(itertools.product([False, True], repeat=2))
    assert {(case.combining.expanded, case.combining.multiple_reduction) for case in drawn} == flags
    assert {case.barrier for case in drawn} == {False, True}
    options = [each for case in drawn for each in (case.first, *case.again)]
    assert {0, 1, 2} == {len(case.again) for case in drawn}
    layouts = {(case.exact_sizes, case.first.do_expand, each.do_expand) for case in drawn for each in case.again}
    assert layouts == set(itertools.product((False, True), repeat=3))
    assert {0, 1, 8} <= {each.num_scales for each in options}
    assert any(each.num_scales > 64 for each in options), "more than a token's lanes hold ahead"
    assert {"rows", "columns", "gaps"} == {each.scale_strides for each in options}
    assert {(each.do_expand, each.do_zero_padding) for each in options} == set(
        itertools.product((False, True), repeat=2)
    )
    assert {each.with_stats for each in options} == {each.with_weights for each in options} == {False, True}
    assert {each.packed for each in options} == {each.col_major_scales for each in options} == {False, True}
    in_place = {(each.do_expand, each.num_scales > 0) for each in options if each.zero_copy}
    assert in_place == set(itertools.product((False, True), repeat=2))
    assert {case.exact_sizes for case in drawn if case.first.zero_copy} == {False, True}
    assert any(each.zero_copy for case in drawn for each in case.again)
    assert any(max(case.tokens) == 0 for case in drawn)
    assert any(0 in case.tokens and max(case.tokens) > 1 for case in drawn)
    assert any(case.first.hidden == story.longest == swarm.LONG for story in stories for case in story.cases)
    assert any(story.num_overlapping > 2 for story in stories)
    assert any(len(set(story.num_sms)) > 1 and 1 in story.num_sms for story in stories)
    assert any(max(story.delays.values(), default=0) > 10**5 for story in stories)

    racing = [swarm.Story.draw(seed, race=True) for seed in range(NUM_RACE_SEEDS)]
    assert {1, 2, 3} == {story.num_ranks for story in racing}
    assert {story.roles for story in racing} == set(swarm.ROLES[: swarm.NUM_RACE_ROLES])
    assert any(story.num_overlapping > 1 for story in racing)
    expanded = [case.combining for story in racing for case in story.cases if case.combining.expanded]
    assert {options.multiple_reduction for options in expanded} == {False, True}
    assert any(story.longest == swarm.LONG for story in racing)
    for some in (stories, racing):
        assert {case.first.zero_copy for story in some for case in story.cases} == {False, True}
        assert {case.combining.zero_copy for story in some for case in story.cases} == {False, True}


@pytest.mark.parametrize("race", [False, pytest.param(True, marks=pytest.mark.race)])
@pytest.mark.parametrize("multiple_reduction", [False, True])
def test_nobody_waits_for_rows_that_are_lost(multiple_reduction: bool, race: bool) -> None:
    """Every token names one expert three times, and the worst case has room for one row a token: the last tokens have
    none at all."""
    case = cases.Case(
        seed=1,
        tokens=(6, 4),
        hidden=520,
        num_topk=3,
        num_experts=2,
        kind="same",
        alignment=1,
        do_cpu_sync=False,
        with_weights=True,
        num_biases=1,
        num_sms=2,
        spare_tokens=0,
        combining=combines.Options(expanded=True, multiple_reduction=multiple_reduction),
    )
    story = replace(swarm.Story.draw(0, race), num_ranks=2, num_sms=(2, 2), delays={}, cases=(case,), num_overlapping=0)
    with World(race_detector=race) as world:
        swarm.tell(story, world, jit.Gxx(race_detector=race))


def test_a_seed_is_one_story() -> None:
    """The same draws and the same schedule, whatever ran before: so a replay command replays."""
    steps = []
    for _ in range(2):
        story = swarm.Story.draw(3, race=False)
        steps.append(swarm.count_steps(story))
    assert steps[0] == steps[1] > 0


def test_a_failure_says_how_to_replay_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("recv_x differs")

    monkeypatch.setattr(swarm, "tell", fail)
    with pytest.raises(
        AssertionError, match=r"(?s)recv_x differs.*replay: python -m tests.sim.swarm --seeds 7:8 --race$"
    ):
        swarm.run_seed(7, race=True)
