"""Plants bugs (tests/sim/bugs.py) in a copy of deep_ep/include, and sees that they are noticed. The package is never
touched.

    python -m tests.sim.planted                 plant each, and say what noticed it
    python -m tests.sim.planted reuse-a-stage   one of them, with the report
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deep_ep import jit
from deep_ep.errors import EPError
from deep_ep.jit.toolchain import INCLUDE_DIR
from deep_ep.machine.world import World
from tests.elastic import cases, combines
from tests.elastic.dispatches import Options
from tests.sim import barriers, mishaps, swarm
from tests.sim.bugs import BUGS, EVERY_ROW, MANY_TOKENS, MAX_SEEDS, RACE, Bug

NUM_RANKS = 2


@dataclass(frozen=True)
class PatchedGxx(jit.Gxx):
    """The simulator's compiler with another copy of the headers."""

    include: Path = INCLUDE_DIR

    @property
    def include_dirs(self) -> tuple[Path, ...]:
        return (self.include, *self.more_include_dirs)


def patched_toolchain(folder: Path, bug: Bug | None) -> PatchedGxx:
    """Copy the headers and plant a bug.

    Raises:
        ValueError: the old text does not stand there as often as it should.
    """
    include = folder / "deep_ep" / "include"
    shutil.copytree(INCLUDE_DIR, include)
    if bug is not None:
        _patch(include, bug.name, bug.file, bug.old, bug.new, bug.times)
        for file, old, new in bug.beside:
            _patch(include, bug.name, file, old, new, times=1)
    race_detector = bug is None or bug.race_detector
    return PatchedGxx(race_detector=race_detector, include=include)


def _patch(include: Path, name: str, file: str, old: str, new: str, times: int) -> None:
    path = include / "deep_ep" / file
    text = path.read_text()
    if (count := text.count(old)) != times:
        raise ValueError(f"{name}: this stands {count} times in {file}, not {times}:\n{old}")
    path.write_text(text.replace(old, new))


def draw_story(seed: int, num_tokens: int, combining: combines.Options, num_sms: int, do_cpu_sync: bool) -> swarm.Story:
    """Short, and with everything in it that a bug may need: peers, several blocks, several operations under way."""
    r = random.Random(seed)
    in_place = combining.zero_copy
    again = Options(8, with_weights=True, do_zero_padding=True, zero_copy=in_place)
    many_rows = combining == EVERY_ROW  # of a token at one rank: the last ones leave long after the first
    drawn = tuple(
        cases.Case(
            seed=seed * 8 + idx,
            tokens=tuple(r.randint(num_tokens, num_tokens + 4) for _ in range(NUM_RANKS)),
            hidden=(hidden := 8 * r.choice([1, 8, 32])),
            num_topk=8 if many_rows else r.choice([2, 3]),
            num_experts=(8 if many_rows else 2) * NUM_RANKS,
            kind="masked" if do_cpu_sync and seed % 4 == 3 else "random",
            alignment=r.choice([1, 4]),
            do_cpu_sync=do_cpu_sync,
            with_weights=True,
            num_biases=idx % 2,
            num_sms=num_sms - (seed + 1) % 2,
            spare_tokens=0,
            options=Options(
                2 * hidden if (num_scales := (4 if in_place else 3) * (seed % 2)) else hidden,
                with_weights=True,
                num_scales=num_scales,  # not whole 16 bytes: lanes move them
                do_expand=r.random() < 0.5,
                do_zero_padding=True,
                with_stats=True,
                zero_copy=in_place,
            ),
            again=(replace(again, hidden=hidden, do_expand=r.random() < 0.5),) * idx,
            repeats_handle=(seed + idx) % 2 == 0,
            combining=combining,
            do_handle_copy=(seed + idx) % 3 != 0,
        )
        for idx in range(2)
    )
    return swarm.Story(
        seed=seed,
        num_ranks=NUM_RANKS,
        roles=swarm.ROLES[0],
        num_sms=(num_sms,) * NUM_RANKS,
        delays={seed % NUM_RANKS: r.choice([0, 10**4, 10**6])},
        largest=num_tokens + 4,
        longest=swarm.SHORT,
        cases=drawn,
        num_overlapping=len(drawn),
    )


def find_error(
    toolchain: jit.Gxx,
    num_tokens: int,
    combining: combines.Options = combines.PLAIN,
    num_sms: int = 3,
    do_cpu_sync: bool = False,
    num_seeds: int = MAX_SEEDS,
) -> tuple[int, str]:
    """Tell stories until one goes wrong.

    Returns:
        how many were told, and the error's text, empty if none did.
    """

    def tell(seed: int, world: World, toolchain: jit.Gxx) -> None:
        swarm.tell(draw_story(seed, num_tokens, combining, num_sms, do_cpu_sync), world, toolchain)

    return find_error_in(tell, toolchain, num_seeds)


def find_error_in(tell: Callable[[int, World, jit.Gxx], Any], toolchain: jit.Gxx, num_seeds: int) -> tuple[int, str]:
    """The same with other stories."""
    for seed in range(num_seeds):
        with World(race_detector=toolchain.race_detector, timeout_s=60) as world:
            try:
                tell(seed, world, toolchain)
            except (AssertionError, EPError) as error:
                return seed + 1, str(error)
    return num_seeds, ""


def tell_of_mishap(seed: int, world: World, toolchain: jit.Gxx) -> None:
    mishap = mishaps.Mishap.draw(seed, toolchain.race_detector)
    mishaps.check(mishap, mishaps.play(mishap, world, toolchain))


OTHER_STORIES: dict[str, Callable[[int, World, jit.Gxx], None]] = {
    "barriers": barriers.tell,
    "mishaps": tell_of_mishap,
}


def plant(bug: Bug | None) -> tuple[int, str]:
    """find_error with a bug, or with a copy that has none."""
    with tempfile.TemporaryDirectory() as folder:
        toolchain = patched_toolchain(Path(folder), bug)
        if bug is None:
            return find_error(toolchain, MANY_TOKENS)
        if bug.stories in OTHER_STORIES:
            return find_error_in(OTHER_STORIES[bug.stories], toolchain, bug.num_seeds)
        return find_error(toolchain, bug.num_tokens, bug.combining, bug.num_sms, bug.do_cpu_sync, bug.num_seeds)


def summary(text: str) -> str:
    """An error in a line."""
    if RACE in text:
        return next((line for line in text.splitlines() if line.startswith("SUMMARY")), RACE)[:180]
    return text.splitlines()[0][:180] if text else "NOTHING"


def main() -> int:
    torch.set_num_threads(1)
    names = sys.argv[1:]
    missed = 0
    for bug in (None, *BUGS):
        name = "nothing planted" if bug is None else bug.name
        if names and name not in names:
            continue
        start = time.perf_counter()
        try:
            seeds, text = plant(bug)
        except ValueError as error:
            seeds, text = 0, str(error)
        ok = (not text) if bug is None else bool(text) and bug.noticed_by in text
        missed += not ok
        print(
            f"{'ok  ' if ok else 'BAD '} {name}: {seeds} seeds, {time.perf_counter() - start:.1f} s: {summary(text)}",
            flush=True,
        )
        if names:
            print(text)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
