"""Calls that cannot end well: a rank that calls something else than its peers, or with other sizes, or never comes.

python -m tests.sim.mishaps --seeds 17:18 [--race]    what happens under seed 17

Every rank that waits in vain must be told so, by a record that names a rank that did not do as it did; nothing hangs,
races, or touches memory that is not its own. Waits expire in virtual time, so none of it takes long.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import deep_ep
from deep_ep import EPError, EPHandle, EPTimeoutError, jit
from deep_ep.layout import Record
from deep_ep.machine.world import SimulationError, World
from tests.sim.ranks import AbandonedError, Buffer, Group, Ranks, Settings
from tests.sim.swarm import NUM_RACE_ROLES, ROLES

MOST, HIDDEN, TIMEOUT_SECONDS = 12, 256, 7
REGISTERED_BYTES = 2 << 20  # all of it up to the window's end


@dataclass(frozen=True)
class Call:
    """What a rank does.

    Attributes:
        operation: dispatch, combine, barrier or nothing.
        num_scales: of a dispatch's rows, which are FP8 then; 0 stands for bfloat16.
        cached: a dispatch takes the handle of an earlier one.
        routes: whose handle a cached dispatch or a combine takes: the last dispatch's, or (-2) the one's before it.
        expanded: the layout of a combine's rows.
        multiple_reduction: how it adds them.
        zero_copy: peers read the rows of a dispatch or a combine where they lie.
        waits: whether a dispatch has CPU sync; None is as the mishap says, which in place all ranks do alike.
    """

    operation: str = "dispatch"
    max_tokens: int = MOST
    hidden: int = 64
    num_topk: int = 2
    experts_per_rank: int = 2
    with_weights: bool = True
    num_scales: int = 0
    cached: bool = False
    routes: int = -1
    expanded: bool = False
    multiple_reduction: bool = True
    zero_copy: bool = False
    waits: bool | None = None

    def has_cpu_sync(self, usually: bool) -> bool:
        return usually if self.waits is None else self.waits

    def in_words(self, do_cpu_sync: bool = False) -> str:
        """As errors say it.

        Args:
            do_cpu_sync: of calls that do not say themselves whether they wait.
        """
        if self.operation == "barrier":
            return "barrier"
        said = [
            f"num_topk {self.num_topk}",
            *(["topk_weights"] if self.with_weights else []),
            *(["a handle"] if self.cached else []),
            *(["scale factors"] if self.num_scales else []),
            *([] if self.multiple_reduction else ["expanded rows that are added in one step"]),
            *(["zero_copy"] if self.zero_copy else []),
            *(["do_cpu_sync"] if self.says_cpu_sync and self.has_cpu_sync(do_cpu_sync) else []),
        ]
        return f"{self.operation} ({', '.join(said)})"

    @property
    def record_bytes(self) -> int:
        """In which its rows travel."""
        if self.operation == "combine":
            return Record.of_combine(2 * self.hidden, self.num_topk).num_bytes
        return Record.of_dispatch(self.hidden * (1 if self.num_scales else 2), self.num_scales).num_bytes

    @property
    def says_cpu_sync(self) -> bool:
        """Whether peers must know if it waits for counts."""
        return self.zero_copy and self.operation == "dispatch" and not self.cached

    def sizes(self, num_ranks: int) -> dict[str, int]:
        """Likewise; what follows from words and rows is left out."""
        return {
            "num_experts": num_ranks * self.experts_per_rank,
            "num_max_tokens_per_rank": self.max_tokens,
            "bytes of a row": self.hidden * (1 if self.num_scales else 2),
            "bytes beside a row": 4 * self.num_scales,
        }


# What all ranks but one do.
USUALS = {
    "dispatch": Call(),
    "fp8": Call(num_scales=4),
    "cached": Call(cached=True),
    "cached fp8": Call(cached=True, num_scales=4),
    "in place": Call(zero_copy=True, waits=False),
    "fp8 in place, CPU sync": Call(num_scales=4, zero_copy=True, waits=True),
    "cached in place": Call(cached=True, zero_copy=True),
    "combine": Call("combine"),
    "combine in place": Call("combine", zero_copy=True),
    "sums": Call("combine", expanded=True),
    "every row": Call("combine", expanded=True, multiple_reduction=False),
    "barrier": Call("barrier"),
}
# In what that one differs.
DIFFERENCES: dict[str, dict[str, Any]] = {
    "a dispatch": {"operation": "dispatch", "expanded": False, "multiple_reduction": True, "hidden": 128},
    "a combine": {"operation": "combine", "cached": False, "num_scales": 0, "hidden": 48},
    "a barrier": {"operation": "barrier"},
    "nothing": {"operation": "nothing"},
    "fewer tokens": {"max_tokens": 8},
    "more tokens": {"max_tokens": 24},
    "selections": {"num_topk": 3},
    "experts": {"experts_per_rank": 5},
    "longer rows": {"hidden": 256},
    "no weights": {"with_weights": False},
    "other rows": {"num_scales": 8},
    "no scales": {"num_scales": 0},
    "a handle": {"cached": True},
    "no handle": {"cached": False},
    "another handle": {"routes": -2},
    "one by one": {"expanded": True, "multiple_reduction": False},
    "added first": {"expanded": True, "multiple_reduction": True},
    "rows in place": {"zero_copy": True, "expanded": False, "multiple_reduction": True},
    "rows that are sent": {"zero_copy": False},
    "CPU sync": {"waits": True},
    "no CPU sync": {"waits": False},
}
OF_ANY_OPERATION = ("a dispatch", "a combine", "a barrier", "nothing")
OF_NEW_ROUTES = ("fewer tokens", "more tokens", "selections", "experts", "a handle")
OF_DISPATCHES = ("longer rows", "no weights", "other rows", "no scales", "rows in place", "rows that are sent")
OF_DISPATCHES_THAT_SAY_CPU_SYNC = ("CPU sync", "no CPU sync")
OF_COMBINES = ("longer rows", "no weights", "another handle", "rows in place", "rows that are sent")
OF_COMBINES_THAT_SEND = ("one by one", "added first")


def pairs() -> list[tuple[str, str]]:
    """Every usual call with everything in which one may differ from it."""
    found = []
    for name, usual in USUALS.items():
        differences = tuple(each for each in OF_ANY_OPERATION if each != f"a {usual.operation}")
        if usual.operation == "combine":
            differences += OF_COMBINES + (() if usual.zero_copy else OF_COMBINES_THAT_SEND)
        elif usual.operation == "dispatch":
            differences += OF_DISPATCHES + (("no handle", "another handle") if usual.cached else OF_NEW_ROUTES)
            differences += OF_DISPATCHES_THAT_SAY_CPU_SYNC if usual.says_cpu_sync else ()
        plan = (usual.in_words(), usual.sizes(1), usual.routes)
        for difference in differences:
            odd = replace(usual, **DIFFERENCES[difference])
            if (odd.in_words(), odd.sizes(1), odd.routes) != plan:
                found.append((name, difference))
    return found


def may_overlap(usual: Call, odd: Call) -> bool:
    """Whether a combine may read records, as soon as they are marked, that lie elsewhere by what their sender calls. A
    call that fails is good for nothing, so that harms nobody, but it is a race."""
    both = (usual, odd)
    if any(call.zero_copy or call.operation not in ("dispatch", "combine") for call in both):
        return False
    if usual.operation == odd.operation == "dispatch":
        return False  # nothing is read before all agree
    by_selection = not (usual.multiple_reduction and odd.multiple_reduction)
    places = {(call.operation, call.routes, call.multiple_reduction) for call in both}
    return usual.record_bytes != odd.record_bytes or (by_selection and len(places) > 1)


PAIRS = pairs()
RACE_PAIRS = [
    (usual, difference)
    for usual, difference in PAIRS
    if not may_overlap(USUALS[usual], replace(USUALS[usual], **DIFFERENCES[difference]))
]


@dataclass(frozen=True)
class Mishap:
    """What happens under one seed: some good round trips, then one rank does something else."""

    seed: int
    num_ranks: int
    odd_rank: int
    usual: Call
    difference: str
    num_good: int
    do_cpu_sync: bool
    expand: bool
    """The layout of what dispatches return on the odd rank."""
    num_sms: int

    @property
    def odd(self) -> Call:
        return replace(self.usual, **DIFFERENCES[self.difference])

    @staticmethod
    def draw(seed: int, race: bool) -> Mishap:
        """The pairs in turn, so that none is missed. Under the race detector there is one peer where records of two
        kinds arrive: those of two would overlap (may_overlap)."""
        r = random.Random(seed)
        pairs = RACE_PAIRS if race else PAIRS
        usual, difference = pairs[seed % len(pairs)]
        of_one_kind = usual == "barrier" or difference in ("nothing", "a barrier")
        num_ranks = r.choice(([2, 3] if of_one_kind else [2]) if race else [2, 2, 3, 4, 8])
        return Mishap(
            seed=seed,
            num_ranks=num_ranks,
            odd_rank=r.randrange(num_ranks),
            usual=USUALS[usual],
            difference=difference,
            num_good=2 if difference == "another handle" else r.choice([1, 2]),
            do_cpu_sync=r.random() < 0.5,
            expand=r.random() < 0.5,
            num_sms=r.choice([1, 2, 3]),
        )

    def expected(self, rank: int) -> str:
        """A pattern of what a rank must be told by the odd one's doing."""
        odd, usual = self.odd, self.usual
        if self.difference == "nothing":
            return f"waited {TIMEOUT_SECONDS}.0 s in "
        theirs, ours = odd.in_words(self.do_cpu_sync), usual.in_words(self.do_cpu_sync)
        if theirs != ours:
            return re.escape(f"called {theirs}, rank {rank} called {ours}.")
        sizes = zip(odd.sizes(self.num_ranks).items(), usual.sizes(self.num_ranks).values(), strict=True)
        for (name, theirs), ours in sizes:
            if theirs != ours:
                return f"made this call with {name} {theirs}, rank {rank} with {ours}\\."
        calls = [1 + 2 * (self.num_good + call.routes) for call in (odd, usual)]  # a combine follows each dispatch
        return rf"used the handle of call {calls[0]} on buffer \d+ of .* rank {rank} the one of call {calls[1]} on "


class Player:
    """One rank: it can make any call, with the handles of good dispatches at hand."""

    def __init__(self, group: Group, mishap: Mishap) -> None:
        settings = {"num_max_tokens_per_rank": 24, "hidden": HIDDEN, "num_gpu_timeout_secs": TIMEOUT_SECONDS}
        self.buffer = Buffer(group, **settings, allow_multiple_reduction=False, num_registered_bytes=REGISTERED_BYTES)
        self.registered = self.buffer.registered_empty([REGISTERED_BYTES], torch.uint8)
        self.mishap, self.rank = mishap, group.rank()
        self.chance = torch.Generator().manual_seed(mishap.seed * 64 + self.rank)
        self.handles: list[EPHandle] = []

    def call(self, call: Call) -> None:
        """Make a call, wait for its kernels, and ask how it went."""
        if call.operation in ("dispatch", "combine"):
            self.buffer.overlaps = call.zero_copy
            given = self._dispatch(call) if call.operation == "dispatch" else self._combine(call)
            if call.zero_copy:
                self._write_again(given)
                self.buffer.run()
        elif call.operation == "barrier":
            self.buffer.barrier()
            self.buffer.run()
        else:
            self.buffer.run()
        self.buffer.get_comm_stream()  # raises what kernels have left

    def _dispatch(self, call: Call) -> Any:
        """Returns what it was given to carry."""
        num_tokens, num_experts = (5 + self.rank) % 7, call.experts_per_rank * self.buffer.num_ranks
        x: Any = torch.randn(num_tokens, call.hidden, generator=self.chance)
        x = x.bfloat16() if call.num_scales == 0 else (x.to(torch.float8_e4m3fn), x[:, : call.num_scales])
        weights = torch.rand(num_tokens, call.num_topk, generator=self.chance) if call.with_weights else None
        expand = self.mishap.expand and self.rank == self.mishap.odd_rank
        usual: dict[str, Any] = {"topk_weights": weights, "num_sms": self.mishap.num_sms, "do_expand": expand}
        if call.zero_copy:
            usual["zero_copy"] = True
            x = self._in_place(x)[0] if call.num_scales == 0 else self._in_place(*x)
        if call.cached:
            self.buffer.dispatch(x, handle=self.handles[call.routes], **usual)
            return x
        idx = torch.rand(num_tokens, num_experts, generator=self.chance).argsort(dim=1)[:, : call.num_topk]
        result = self.buffer.dispatch(
            x,
            topk_idx=idx.to(deep_ep.topk_idx_t),
            num_experts=num_experts,
            num_max_tokens_per_rank=call.max_tokens,
            do_cpu_sync=call.has_cpu_sync(self.mishap.do_cpu_sync),
            **usual,
        )
        self.handles.append(result[3])
        return x

    def _combine(self, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        handle = self.handles[call.routes]
        handle.do_expand, self.buffer.allow_multiple_reduction = call.expanded, call.multiple_reduction
        rows = handle.num_expanded_tokens if call.expanded else handle.num_recv_tokens
        weights = torch.ones(rows) if call.expanded else torch.ones(rows, call.num_topk)
        x = torch.ones(rows, call.hidden, dtype=torch.bfloat16)
        if call.zero_copy:
            x, weights = self._in_place(x, weights)
        given = weights if call.with_weights else None
        self.buffer.combine(x, handle, topk_weights=given, zero_copy=call.zero_copy)
        return x, weights

    def _in_place(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The same at the end of registered memory, and of the window, the first last: who reads more than there is
        leaves the world."""
        placed, end = [], REGISTERED_BYTES
        for tensor in given:
            begin = (end - tensor.numel() * tensor.element_size()) // 16 * 16
            memory = self.registered[begin:][: tensor.numel() * tensor.element_size()]
            placed.append(memory.view(tensor.dtype).view(tensor.shape).copy_(tensor))
            end = begin
        return tuple(placed)

    def _write_again(self, given: Any) -> None:
        """Nobody may read any more what was given to a call in place that has ended, well or not."""
        for tensor in given if isinstance(given, tuple) else (given,):
            self.buffer.write_in_order(tensor, torch.zeros_like(tensor))


def play(mishap: Mishap, world: World, toolchain: jit.Gxx) -> list[str]:
    """Let it happen; returns what each rank was told, empty where it noticed nothing."""
    told = [""] * mishap.num_ranks
    num_sms = (mishap.num_sms,) * mishap.num_ranks
    delays = {mishap.odd_rank: random.Random(mishap.seed).choice([0, 10**4, 10**6])}
    ranks = Ranks(world, mishap.num_ranks, Settings(toolchain, mishap.seed << 16, num_sms, delays, "expire"))

    def program(group: Group) -> None:
        player = Player(group, mishap)
        for _ in range(mishap.num_good):
            player.call(USUALS["dispatch"])
            player.call(USUALS["combine"])
        try:
            player.call(mishap.odd if group.rank() == mishap.odd_rank else mishap.usual)
        except (AbandonedError, SimulationError):
            raise  # nothing that a user is told
        except EPError as error:
            told[group.rank()] = f"{type(error).__name__}: {error}"
            refused(player)

    ranks.run(random.Random(mishap.seed).choice(ROLES[:NUM_RACE_ROLES]), program)
    return told


def refused(player: Player) -> None:
    """A buffer that was told so does nothing more."""
    for name in ("dispatch", "combine", "barrier"):
        with pytest.raises(EPError, match="must be rebuilt on every rank"):
            player.call(USUALS[name])


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
            expected = mishap.expected(rank)
            assert re.search(expected, text), f"rank {rank} was told {text!r}, without {expected!r}"
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
