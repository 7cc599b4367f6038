"""Barriers between launches of other kernels that nothing else orders, and between dispatches and combines.

python -m tests.sim.barriers --seeds 17:18 [--race]    what happens under seed 17
"""

from __future__ import annotations

import argparse
import ctypes
import random
import sys
from dataclasses import dataclass

import torch

from deep_ep import jit
from deep_ep.machine.world import World
from deep_ep.ops.arguments import Window
from tests.elastic import cases
from tests.sim import swarm
from tests.sim.ranks import Buffer, Group, Ranks, Settings

NUM_ROUNDS, MOST = 3, 4
CPU = torch.device("cpu")


@dataclass(frozen=True)
class PassOnConfig:
    """There is nothing to choose."""


class PassOnArgs(ctypes.Structure):
    _fields_ = [("window", Window), ("value", ctypes.c_uint32), ("seen", ctypes.c_void_p)]


PASS_ON = jit.Kernel("pass_on", PassOnConfig(), PassOnArgs, num_threads=32, header="pass_on.cuh")


class Player:
    """One rank, whose launches all wait in its queue."""

    def __init__(self, group: Group) -> None:
        self.machine_of = group
        self.buffer = Buffer(group, num_max_tokens_per_rank=MOST, hidden=64, allow_multiple_reduction=False)
        self.buffer.overlaps = True
        self.seen = torch.zeros(NUM_ROUNDS, dtype=torch.int32)

    def pass_on(self, value: int) -> None:
        self._launch(value, [])

    def look(self, round_idx: int) -> None:
        self._launch(0, [self.seen[round_idx]])

    def _launch(self, value: int, seen: list[torch.Tensor]) -> None:
        window = self.buffer._end().window_argument
        args = PassOnArgs(window, value, seen[0].data_ptr() if seen else None)
        self.machine_of.machine.launch(
            PASS_ON, args, num_blocks=1, shared_bytes=0, stream=None, reads=[], writes=[self.seen]
        )


def draw_trip(seed: int, num_ranks: int) -> cases.Case:
    """Small, and often such that a rank sends nothing to another, which may then be an operation ahead."""
    r = random.Random(seed)
    return cases.Case(
        seed=seed,
        tokens=tuple(r.choice([0, 0, 0, 1, MOST]) for _ in range(num_ranks)),
        hidden=64,
        num_topk=2,
        num_experts=2 * num_ranks,
        kind="random",
        alignment=1,
        do_cpu_sync=False,
        with_weights=True,
        num_biases=0,
        num_sms=5,
        spare_tokens=0,
        barrier=r.random() < 0.5,
    )


def tell(seed: int, world: World, toolchain: jit.Gxx) -> None:
    """Raises AssertionError or SimulationError."""
    r = random.Random(seed)
    num_ranks, delay = r.choice([2, 2, 3]), r.choice([0, 10**4, 10**6])
    num_sms = tuple(r.choice([1, 2, 5]) for _ in range(num_ranks))  # who has few is soon done
    settings = Settings(toolchain, seed << 16, num_sms, {r.randrange(num_ranks): delay})
    has_trip = [r.random() < 0.5 for _ in range(NUM_ROUNDS)]

    def program(group: Group) -> None:
        player, rank = Player(group), group.rank()
        trips = []
        for idx in range(NUM_ROUNDS):
            if has_trip[idx]:
                trips.append(cases.Trip(draw_trip(seed * NUM_ROUNDS + idx, num_ranks), player.buffer, CPU))
                player.buffer.barrier()
            player.pass_on(100 * idx + rank)
            player.buffer.barrier()
            player.look(idx)
            player.buffer.barrier()
        player.buffer.run()
        left = (rank - 1) % num_ranks
        assert player.seen.tolist() == [100 * idx + left for idx in range(NUM_ROUNDS)]
        for trip in trips:
            trip.check()

    with swarm.shared_oracle():
        Ranks(world, num_ranks, settings).run(swarm.ROLES[0], program)


def run_seed(seed: int, race: bool) -> None:
    """Raises AssertionError, with the command that replays it."""
    with World(race_detector=race) as world:
        try:
            tell(seed, world, jit.Gxx(race_detector=race))
        except Exception as error:
            replay = f"python -m tests.sim.barriers --seeds {seed}:{seed + 1}{' --race' if race else ''}"
            raise AssertionError(f"{type(error).__name__}: {error}\nreplay: {replay}") from error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:20", help="first:last, the last not included")
    parser.add_argument("--race", action="store_true", help="under the race detector")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    first, last = map(int, arguments.seeds.split(":"))
    for seed in range(first, last):
        run_seed(seed, arguments.race)
    print(f"{last - first} stories with barriers: OK")
    return 0


if __name__ == "__main__":
    sys.exit(main())
