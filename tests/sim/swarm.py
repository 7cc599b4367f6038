"""One seed is one whole story: how many ranks, how fast each is, what they send, and in which order all of it happens.

python -m tests.sim.swarm --seeds 17:18            the story of seed 17 again
python -m tests.sim.swarm --seeds 30:40 --race     ten stories under the race detector
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from deep_ep import jit
from deep_ep.layout import MAX_TOPK
from deep_ep.machine.world import World
from deep_ep.plan import CombineRoles, Crew, Roles, RolesOfMachine
from tests import oracle
from tests.elastic import cases
from tests.elastic.registered import LINE
from tests.sim.ranks import Buffer, Group, Ranks, Settings

# Few, because each is two compiles; odd counts of warps and stages among them. Crew: warps, stages, of those storing.
ROLES = (
    RolesOfMachine(
        dispatch=Roles(
            send=Crew(1, 3, 2),
            receive=Crew(2, 2, 1),
            send_cost=1.3,
            known_send_cost=1.3,
            expanded_send_cost=1.3,
            tokens_per_counter=8,
        ),
        combine=CombineRoles(send=Crew(1, 3, 2), num_warps=3, send_share=1.0, heralds=True),
        combine_sums=CombineRoles(send=Crew(1, 2, 1), num_warps=3, send_share=0.4, heralds=False),
        warps_in_place=3,
    ),
    RolesOfMachine(
        dispatch=Roles(
            send=Crew(2, 2, 1),
            receive=Crew(1, 5, 3),
            send_cost=4.0,
            known_send_cost=4.0,
            expanded_send_cost=4.0,
            tokens_per_counter=1000,
        ),
        combine=CombineRoles(send=Crew(2, 4, 2), num_warps=5, send_share=0.5, heralds=False),
        combine_sums=CombineRoles(send=Crew(1, 4, 3), num_warps=3, send_share=1.0, heralds=True),
        warps_in_place=5,
    ),
    RolesOfMachine(
        dispatch=Roles(
            send=Crew(3, 2, 1),
            receive=Crew(3, 3, 2),
            send_cost=0.7,
            known_send_cost=0.7,
            expanded_send_cost=0.7,
            tokens_per_counter=1,
        ),
        combine=CombineRoles(send=Crew(3, 7, 6), num_warps=8, send_share=0.7, heralds=True),
        combine_sums=CombineRoles(send=Crew(3, 2, 1), num_warps=7, send_share=0.7, heralds=False),
        warps_in_place=2,
    ),
    RolesOfMachine(
        dispatch=Roles(
            send=Crew(1, 9, 8),
            receive=Crew(1, 1, 0),
            send_cost=2.0,
            known_send_cost=2.0,
            expanded_send_cost=2.0,
            tokens_per_counter=3,
        ),
        combine=CombineRoles(send=Crew(1, 2, 1), num_warps=4, send_share=0.2, heralds=False),
        combine_sums=CombineRoles(send=Crew(2, 3, 1), num_warps=5, send_share=0.2, heralds=True),
        warps_in_place=4,
    ),
)
NUM_RACE_ROLES = 2  # with few threads
MOST_SCALES = 100  # of a row (tests/elastic/choices.py)
SHORT, LONG = 1024, 32768  # values of a row, at most: the long ones do not fit into a stage


@dataclass(frozen=True)
class Story:
    """What happens under one seed.

    Attributes:
        largest: tokens of a rank, at most.
        longest: values of a row, at most.
        cases: round trips, one after the other on the same buffer.
        num_overlapping: so many of the last ones are all under way before the first of them is checked.
    """

    seed: int
    num_ranks: int
    roles: RolesOfMachine
    num_sms: tuple[int, ...]
    delays: dict[int, int]
    largest: int
    longest: int
    cases: tuple[cases.Case, ...]
    num_overlapping: int

    @staticmethod
    def draw(seed: int, race: bool) -> Story:
        """Under the race detector worlds are small: a thread costs it 0.4 ms to make."""
        r = random.Random(seed)
        num_ranks = r.choice([1, 2, 2, 3] if race else [1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 6, 8, 11, 16])
        small = race or num_ranks > 4
        most_sms = 2 if race else 5 if num_ranks <= 4 else 3
        # A GPU has as many SMs as its peers, but who can tell what a user gives to a call.
        num_sms = [r.randint(1, most_sms)] * num_ranks
        if r.random() < 0.4:
            num_sms = [r.randint(1, most_sms) for _ in range(num_ranks)]
        slow = r.choice([0, 0, 10**4, 10**5, 10**6])
        largest = r.choice([6, 6, 28]) if race else 10 if small else 24  # 28: some warp announces a full batch
        longest = SHORT
        if num_ranks < 4 and r.random() < 0.15:
            largest, longest = 6, LONG
        drawn = tuple(
            cases.Case.draw(seed * 8 + idx, num_ranks, largest, longest)
            for idx in range(r.choice([1, 2, 3] if small else [2, 3, 4]))
        )
        if race:  # many experts are more of the same
            drawn = tuple(
                replace(case, num_experts=num_ranks * min(case.num_experts // num_ranks, 4)) for case in drawn
            )
        return Story(
            seed=seed,
            num_ranks=num_ranks,
            roles=r.choice(ROLES[:NUM_RACE_ROLES] if race else ROLES),
            num_sms=tuple(num_sms),
            delays={rank: r.randint(0, slow) for rank in range(num_ranks)} if slow else {},
            largest=largest,
            longest=longest,
            cases=drawn,
            num_overlapping=r.choice([0, len(drawn), r.randint(0, len(drawn))]),
        )


def replay_command(seed: int, race: bool) -> str:
    return f"python -m tests.sim.swarm --seeds {seed}:{seed + 1}{' --race' if race else ''}"


@contextmanager
def shared_oracle() -> Iterator[None]:
    """All ranks ask the oracle the same questions; it answers each one once."""
    answers: dict[object, Any] = {}
    lock = threading.Lock()

    def once(function: Callable[..., Any]) -> Callable[..., Any]:
        def ask(first: Any, *rest: Any, **named: Any) -> Any:
            # Inputs of all ranks are a list that an earlier answer keeps alive, so its identity will do.
            key = (function, id(first) if isinstance(first, list) else first, repr((rest, named)))
            with lock:
                if key not in answers:
                    answers[key] = function(first, *rest, **named)
                return answers[key]

        return ask

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "draw", once(oracle.draw))
        patch.setattr(oracle, "redraw", once(oracle.redraw))
        patch.setattr(oracle, "dispatch", once(oracle.dispatch))
        yield


def tell(story: Story, world: World, toolchain: jit.Gxx) -> int:
    """Run a story; returns the steps that its simulations took. Raises AssertionError or SimulationError."""
    settings = Settings(toolchain, story.seed << 16, story.num_sms, story.delays)
    ranks = Ranks(world, story.num_ranks, settings)

    def program(group: Group) -> None:
        most = story.largest + 8
        buffer = Buffer(
            group,
            num_max_tokens_per_rank=most,
            hidden=story.longest,
            allow_multiple_reduction=False,
            num_registered_bytes=registered_bytes(story, most),
        )
        num_alone = len(story.cases) - story.num_overlapping
        for case in story.cases[:num_alone]:
            cases.run(case, buffer, torch.device("cpu"))
        buffer.overlaps = True
        trips = [cases.Trip(case, buffer, torch.device("cpu")) for case in story.cases[num_alone:]]
        buffer.run()
        for trip in trips:
            trip.check()

    with shared_oracle():
        ranks.run(story.roles, program)
    return ranks.num_steps


def registered_bytes(story: Story, most: int) -> int:
    """Twice what a call takes, so that its tensors lie apart wherever the ring begins again (elastic/registered.py);
    the next calls find it in use, and must not write there too early.

    Args:
        most: tokens of a rank.
    """
    beside = 4 * max(MAX_TOPK, MOST_SCALES)  # bytes of a row's weights or scale factors
    return 2 * (story.num_ranks * most * (2 * story.longest + beside) + 2 * LINE)


def count_steps(story: Story) -> int:
    """What makes two runs of a story comparable."""
    with World() as world:
        return tell(story, world, jit.Gxx())


def run_seed(seed: int, race: bool, toolchain: jit.Gxx | None = None) -> None:
    """Tell the story of a seed in a world of its own, so that it is the same story in whatever company it is told.

    Raises:
        AssertionError: something differs from the oracle, or the simulation failed; ends with the replay command.
    """
    toolchain = toolchain or jit.Gxx(race_detector=race)
    story = Story.draw(seed, race)
    with World(race_detector=race) as world:
        try:
            tell(story, world, toolchain)
        except Exception as error:
            text = f"{type(error).__name__}: {error}\n{story}\nreplay: {replay_command(seed, race)}"
            raise AssertionError(text) from error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:20", help="first:last, the last not included")
    parser.add_argument("--race", action="store_true", help="under the race detector")
    parser.add_argument("--keep-going", action="store_true", help="print a line for each failing seed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    first, last = map(int, arguments.seeds.split(":"))
    start, num_failed = time.perf_counter(), 0
    for seed in range(first, last):
        try:
            run_seed(seed, arguments.race)
        except AssertionError as error:  # noqa: PERF203 (a seed takes longer)
            num_failed += 1
            print(f"seed {seed}: {str(error).splitlines()[0]}" if arguments.keep_going else error)
            if not arguments.keep_going:
                break
    print(f"{last - first} seeds, {num_failed} failed, {time.perf_counter() - start:.1f} s")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
