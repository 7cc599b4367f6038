"""Calls that cannot end well: a rank that calls something else than its peers, or with other sizes, or never comes.

python -m tests.sim.mishaps --seeds 17:18 [--race]    what happens under seed 17

Every rank that waits in vain must be told so, by a record that names a rank that did not do as it did; nothing hangs,
races, or touches memory that is not its own. Waits expire in virtual time, so none of it takes long.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import deep_ep
from deep_ep import EPError, EPTimeoutError, jit
from deep_ep.machine.world import World
from tests.sim.ranks import Buffer, Group, Ranks, Settings
from tests.sim.swarm import NUM_RACE_ROLES, ROLES

MOST, HIDDEN, TIMEOUT_SECONDS = 12, 256, 7


@dataclass(frozen=True)
class Call:
    """A dispatch or a combine: what one rank does while its peers do something else."""

    operation: str = "dispatch"
    max_tokens: int = MOST
    hidden: int = 64
    num_topk: int = 2
    experts_per_rank: int = 2
    with_weights: bool = True
    cached: bool = False


USUAL = Call()
# Each differs in one thing, and what the error must say of it: theirs and ours, as the peers see it.
DIFFERENCES: dict[str, tuple[Call, str]] = {
    "operation": (Call(operation="combine"), "called combine (num_topk 2, topk_weights), rank {rank} called dispatch"),
    "max_tokens": (Call(max_tokens=8), "with num_max_tokens_per_rank 8, rank {rank} with 12"),
    "more tokens": (Call(max_tokens=24), "with num_max_tokens_per_rank 24, rank {rank} with 12"),
    "hidden": (Call(hidden=256), "with bytes of a row 512, rank {rank} with 128"),
    "num_topk": (
        Call(num_topk=3),
        "called dispatch (num_topk 3, topk_weights), rank {rank} called dispatch (num_topk 2",
    ),
    "experts": (Call(experts_per_rank=5), "with num_experts "),
    "weights": (
        Call(with_weights=False),
        "called dispatch (num_topk 2), rank {rank} called dispatch (num_topk 2, topk",
    ),
    "handle": (
        Call(cached=True),
        "called dispatch (num_topk 2, topk_weights, a handle), rank {rank} called dispatch (num",
    ),
    "nothing": (Call(operation="nothing"), "waited 7.0 s in "),
}


@dataclass(frozen=True)
class Mishap:
    """What happens under one seed: some good round trips, then one rank does something else."""

    seed: int
    num_ranks: int
    odd_rank: int
    difference: str
    num_good: int
    do_cpu_sync: bool
    in_combine: bool
    """The odd one out of a combine, not of a dispatch."""
    num_sms: int

    @staticmethod
    def draw(seed: int, race: bool) -> Mishap:
        r = random.Random(seed)
        num_ranks = r.choice([2, 3] if race else [2, 2, 3, 4, 8])
        difference = r.choice([*DIFFERENCES])
        return Mishap(
            seed=seed,
            num_ranks=num_ranks,
            odd_rank=r.randrange(num_ranks),
            difference=difference,
            num_good=r.choice([1, 2]),
            do_cpu_sync=r.random() < 0.5,
            in_combine=difference == "nothing" and r.random() < 0.5,
            num_sms=r.choice([1, 2, 3]),
        )


class Player:
    """One rank: it can make any call, with the results of a good dispatch at hand."""

    def __init__(self, group: Group, mishap: Mishap) -> None:
        self.buffer = Buffer(group, num_max_tokens_per_rank=24, hidden=HIDDEN, num_gpu_timeout_secs=TIMEOUT_SECONDS)
        self.mishap, self.rank = mishap, group.rank()
        self.result: Any = None

    def call(self, call: Call) -> None:
        """Make a call, wait for its kernels, and ask how it went."""
        if call.operation == "dispatch":
            self.result = self._dispatch(call)
        elif call.operation == "combine":
            recv_x, _, recv_weights, handle, _ = self.result
            self.buffer.combine(recv_x, handle, topk_weights=recv_weights)
        else:
            self.buffer.run()
        self.buffer.get_comm_stream()  # raises what kernels have left

    def _dispatch(self, call: Call) -> Any:
        num_tokens, num_experts = (5 + self.rank) % 7, call.experts_per_rank * self.buffer.num_ranks
        chance = torch.Generator().manual_seed(self.mishap.seed * 64 + self.rank)
        if call.cached:
            x = torch.randn(num_tokens, call.hidden, generator=chance).bfloat16()
            weights = torch.rand(num_tokens, call.num_topk, generator=chance)
            return self.buffer.dispatch(x, topk_weights=weights, handle=self.result[3], num_sms=self.mishap.num_sms)
        idx = torch.rand(num_tokens, num_experts, generator=chance).argsort(dim=1)[:, : call.num_topk]
        return self.buffer.dispatch(
            torch.randn(num_tokens, call.hidden, generator=chance).bfloat16(),
            topk_idx=idx.to(deep_ep.topk_idx_t),
            topk_weights=torch.rand(num_tokens, call.num_topk, generator=chance) if call.with_weights else None,
            num_experts=num_experts,
            num_max_tokens_per_rank=call.max_tokens,
            num_sms=self.mishap.num_sms,
            do_cpu_sync=self.mishap.do_cpu_sync,
        )


def play(mishap: Mishap, world: World, toolchain: jit.Gxx) -> list[str]:
    """Let it happen; returns what each rank was told, empty where it noticed nothing."""
    told = [""] * mishap.num_ranks
    num_sms = (mishap.num_sms,) * mishap.num_ranks
    delays = {mishap.odd_rank: random.Random(mishap.seed).choice([0, 10**4, 10**6])}
    ranks = Ranks(world, mishap.num_ranks, Settings(toolchain, mishap.seed << 16, num_sms, delays, "expire"))

    def program(group: Group) -> None:
        player = Player(group, mishap)
        for _ in range(mishap.num_good):
            player.call(USUAL)
            player.call(Call(operation="combine"))
        usual = Call(operation="combine") if mishap.in_combine else USUAL
        odd = DIFFERENCES[mishap.difference][0]
        try:
            player.call(odd if group.rank() == mishap.odd_rank else usual)
        except EPError as error:
            told[group.rank()] = f"{type(error).__name__}: {error}"
            refused(player)

    ranks.run(random.Random(mishap.seed).choice(ROLES[:NUM_RACE_ROLES]), program)
    return told


def refused(player: Player) -> None:
    """A buffer that was told so does nothing more."""
    for call in (USUAL, Call(operation="combine")):
        with pytest.raises(EPError, match="must be rebuilt on every rank"):
            player.call(call)


def check(mishap: Mishap, told: list[str]) -> None:
    """Every rank was told what it can know: its peers did one thing, the odd one out another."""
    differs = mishap.difference != "nothing"
    for rank, text in enumerate(told):
        if rank == mishap.odd_rank and not differs:
            assert text == "", f"rank {rank} has made no call, and was told {text}"
            continue
        kind = EPError if differs else EPTimeoutError
        assert text.startswith(f"{kind.__name__}: "), f"rank {rank} was told {text!r}"
        if rank != mishap.odd_rank:
            expected = DIFFERENCES[mishap.difference][1].format(rank=rank)
            assert expected in text, f"rank {rank} was told {text!r}, without {expected!r}"
            assert f"rank {mishap.odd_rank}" in text, f"rank {rank} was told {text!r}"


def run_seed(seed: int, race: bool) -> None:
    """Raises AssertionError, with the command that replays it."""
    mishap = Mishap.draw(seed, race)
    with World(race_detector=race) as world:
        try:
            check(mishap, play(mishap, world, jit.Gxx(race_detector=race)))
        except Exception as error:
            replay = f"python -m tests.sim.mishaps --seeds {seed}:{seed + 1}{' --race' if race else ''}"
            raise AssertionError(f"{type(error).__name__}: {error}\n{mishap}\nreplay: {replay}") from error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:20", help="first:last, the last not included")
    parser.add_argument("--race", action="store_true", help="under the race detector")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    first, last = map(int, arguments.seeds.split(":"))
    run: Callable[[int, bool], None] = run_seed
    for seed in range(first, last):
        run(seed, arguments.race)
    print(f"{last - first} mishaps, all told as they should be")
    return 0


if __name__ == "__main__":
    sys.exit(main())
