"""Bugs to plant, as patches of the headers, and what must notice them.

Each one is a mistake that was made in such a protocol before: a missing fence, wait, release, acquire or
synchronisation, a place off by one, a counter that is not reset. All live in a copy of deep_ep/include; the package is
never touched.

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
from dataclasses import dataclass
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

MAX_SEEDS = 40
NUM_RANKS = 2
TWO_SENDERS = 5  # SMs: with the simulated roles, two of them send
MANY_TOKENS = 24  # a warp announces a batch while later pieces are under way


@dataclass(frozen=True)
class Bug:
    """A text of one header, and what stands there instead.

    Attributes:
        noticed_by: a text that the error must hold; which tool is to see it is part of what we know about a bug.
        times: how often the old text stands there.
        num_tokens: that a rank sends at least; what shows late needs many.
        num_sms: of every call, at most.
        combining: the layout in which it shows.
        stories: which are told: round trips, and all that is said above goes for these; barriers, or mishaps.
        num_seeds: within which it must be noticed.
        race_detector: whether it takes one; without, a seed takes a fifth of the time.
        beside: file, old and new text of what is no bug by itself and makes this one show.
    """

    name: str
    file: str
    old: str
    new: str
    noticed_by: str
    times: int = 1
    num_tokens: int = 3
    num_sms: int = 3
    combining: combines.Options = combines.PLAIN
    stories: str = "trips"
    num_seeds: int = MAX_SEEDS
    race_detector: bool = True
    beside: tuple[str, str, str] | None = None


SUMS = combines.Options(expanded=True, multiple_reduction=True)
EVERY_ROW = combines.Options(expanded=True, multiple_reduction=False)
RACE, DEADLOCK = "data race", "deadlock"
FENCE_SHARED = "    device::fence_async_proxy_shared();\n"
FENCE_GLOBAL = "    device::fence_async_proxy_global();\n"
SYNC_WARP = "    device::sync_warp();\n"

BUGS = (
    # The copy engine does not see what threads did to a stage: one for each place where it must.
    Bug("scatter-without-fence", "phases/scatter.cuh", "  device::fence_async_proxy_shared();\n", "", RACE),
    Bug("push-without-fence", "phases/push_rows.cuh", "if (row_ends || kReturn == Return::kSum)", "if (false)", RACE),
    Bug("landed-without-fence", "phases/land.cuh", "device::fence_async_proxy_shared();  // the label", "//", RACE),
    # Nor what was acquired from a peer.
    Bug("arrivals-without-fence", "phases/arrivals.cuh", FENCE_GLOBAL, "", RACE),
    Bug("admit-without-fence", "phases/admit.cuh", "  device::fence_async_proxy_global();", "", RACE),
    # Announcements.
    Bug(
        "announce-before-stores-are-complete",
        "phases/announce.cuh",
        "    if (device::elect()) {\n      if (is_due)",
        "    if (false) {\n      if (is_due)",
        RACE,
        num_tokens=MANY_TOKENS,
    ),
    Bug("announce-relaxed", "phases/announce.cuh", "store_release_sys", "store_relaxed_sys", RACE),
    Bug("arrivals-relaxed", "phases/arrivals.cuh", "load_acquire_sys(mark())", "load_relaxed_sys(mark())", RACE,
        times=2),
    Bug("labels-relaxed", "phases/arrivals.cuh", "load_acquire_sys(word())", "load_relaxed_sys(word())", RACE, times=2),
    Bug("routed-before-labels", "phases/route.cuh", "device::fence_sys();", "", RACE),
    Bug("parts-relaxed", "phases/reduce.cuh", "load_acquire_sys", "load_relaxed_sys", RACE),
    Bug(
        "announce-the-next-slot",
        "phases/announce.cuh",
        "window.rank, slot_of_lane), epoch",
        "window.rank, slot_of_lane + 1), epoch",
        DEADLOCK,
    ),
    # Rows of the expanded layout.
    Bug("sum-without-fence", "phases/push_rows.cuh", "if (row_ends || kReturn == Return::kSum)",
        "if (row_ends && kReturn != Return::kSum)", RACE, combining=SUMS),
    Bug("sum-of-own-rows-unrounded", "phases/reduce.cuh", "parts.sum = device::ballot(own && selection.speaks);", "",
        "differs", combining=SUMS),
    Bug("own-sum-first", "phases/reduce.cuh", "parts.lanes & (parts.sum - 1)",
        "parts.lanes & (parts.sum - 1) & -(parts.sum == 0)",
        "differs", combining=SUMS),
    Bug("announce-the-first-row", "phases/push_rows.cuh", ".last = last}", ".last = row_ends}", RACE,
        combining=EVERY_ROW),
    Bug("row-of-the-next-selection", "phases/push_rows.cuh", "parcel.place + k", "parcel.place + k + 1", "",
        combining=EVERY_ROW),
    Bug("rows-relaxed", "phases/reduce.cuh", "load_acquire_sys", "load_relaxed_sys", RACE, combining=EVERY_ROW),
    # The ring.
    Bug("ring-without-mbarrier-wait", "phases/ring.cuh", "device::mbarrier_wait(", "static_cast<void>(", ""),
    Bug("ring-waits-for-one-parity", "phases/ring.cuh", "drained / kStages & 1", "0", ""),
    Bug("reuse-a-stage", "phases/ring.cuh", "        device::bulk_wait_read<kStoring>();\n", "", RACE),
    Bug("ring-without-mbarrier-fence", "phases/ring.cuh", "device::fence_mbarrier_init();", "", "fence_mbarrier_init"),
    # Synchronisation of warps and blocks.
    Bug("reduce-without-sync", "phases/reduce.cuh", "device::sync_warp();  // one lane has acquired for all", "", RACE),
    Bug("ring-without-sync", "phases/ring.cuh", SYNC_WARP, "", RACE, times=3),
    Bug("count-without-sync", "phases/count.cuh", "  device::sync_warp();\n", "", RACE, times=3),
    Bug("route-without-sync", "phases/route.cuh", SYNC_WARP, "", RACE, times=2),
    Bug("announce-oneself-without-sync", "phases/announce.cuh", "device::sync_warp();  // one lane has waited for all",
        "", RACE, num_tokens=MANY_TOKENS, combining=SUMS),
    Bug("mailbox-filled-again-too-soon", "phases/announce.cuh", "if (handed_over_ > 0) device::mbarrier_wait",
        "if (false) device::mbarrier_wait", RACE, num_tokens=MANY_TOKENS),
    Bug("dispatch-without-sync", "kernels/dispatch.cuh", "  device::sync_block();\n", "", "", times=2),
    Bug("recall-without-sync", "kernels/dispatch.cuh", "  device::sync_block();\n  const bool good",
        "  const bool good", RACE),
    Bug("counting-without-sync", "wire/blocks.cuh", "device::sync_named(1, num_counting_threads());", "", RACE),
    Bug("collect-without-sync", "phases/collect.cuh", "  device::sync_warp();\n\n", "", RACE),
    # Places.
    Bug("stage-at-the-next-slot", "phases/push_rows.cuh", ".row = parcel.slot,", ".row = parcel.slot + 1,", ""),
    Bug(
        "next-row", "phases/copy_out.cuh", "row_base[token_.source] + token_.slot,",
        "row_base[token_.source] + token_.slot + 1,", "",
    ),
    Bug("one-row-of-padding-too-many", "phases/blank.cuh", "start + align_up(count, alignment)",
        "start + align_up(count, alignment) + 1", ""),
    Bug("count-oneself-twice", "phases/count.cuh", "return before + device::popcount(same & device::lanes_below())",
        "return before + device::popcount(same & device::lanes_below()) + 1", ""),
    # Who asks what the others call, and tells of it.
    Bug("agree-with-anything", "phases/agree.cuh", "device::ballot(came && theirs != mine && item != kTokensItem)",
        "device::ballot(false)",
        "was told '", stories="mishaps", race_detector=False),
    Bug("agree-whatever-the-handle", "phases/agree.cuh", "came && theirs != mine", "came && item < 5 && theirs != mine",
        "was told ''", stories="mishaps", num_seeds=64, race_detector=False),
    Bug("agree-with-the-first-warpful", "phases/agree.cuh", "first < num_words;", "first < 32;",
        "was told '", stories="mishaps", num_seeds=128, race_detector=False),
    Bug("agree-on-the-call-before", "phases/agree.cuh", "plan_word(window, epoch, window.rank, source, item)",
        "plan_word(window, epoch - 1, window.rank, source, item)", "in agree: for rank", stories="mishaps",
        race_detector=False),
    Bug("agree-with-oneself", "phases/agree.cuh", "plan_word(window, epoch, window.rank, source, item)",
        "plan_word(window, epoch, window.rank, window.rank, item)", "was told '", stories="mishaps",
        race_detector=False),
    Bug("blame-oneself", "phases/agree.cuh", "{.phase = where, .peer = source, .expected = mine}, theirs",
        "{.phase = where, .peer = source, .expected = theirs}, mine", "without", stories="mishaps",
        race_detector=False),
    # Barriers.
    Bug("barrier-that-waits-for-nobody", "kernels/barrier.cuh", "admit_warp(a.window, epoch + 1, a.patience);", ";",
        RACE, stories="barriers"),
    Bug("barrier-that-acquires-nothing", "phases/admit.cuh", "load_acquire_sys", "load_relaxed_sys", RACE,
        stories="barriers"),
    Bug("barrier-that-releases-nothing", "phases/retire.cuh", "store_release_sys", "store_relaxed_sys", RACE,
        stories="barriers"),
    Bug("claim-in-two-steps", "phases/claims.cuh", "asked_ = device::fetch_add_relaxed_gpu(counter_, 1u);",
        "asked_ = device::load_relaxed_gpu(counter_), device::store_relaxed_gpu(counter_, asked_ + 1);", "",
        num_sms=TWO_SENDERS),
    Bug("look-back-at-all-blocks", "phases/look_back.cuh", "first + j < device::block_idx()", "first + j < team.end()",
        "", num_sms=TWO_SENDERS, num_tokens=MANY_TOKENS),
    Bug("publish-what-one-block-counted", "phases/publish.cuh", "tables.expert_total[rank", "tables.expert_below[rank",
        "", num_sms=TWO_SENDERS, num_tokens=MANY_TOKENS),
    Bug("rank-for-a-position", "phases/route.cuh", "said.position(abreast.k) = position;",
        "said.position(abreast.k) = rank;", "", race_detector=False),
    Bug("scale-of-the-word-before", "phases/payload.cuh", "    scales.at(row, i) =",
        "    scales.at(row, i - (i > 0)) =", "", race_detector=False),
    # Routes that are known, and what is told about them.
    Bug("recall-aligned-ends", "phases/recall.cuh", "known.per_expert_end[e] - known.per_expert[e];",
        "known.per_expert_aligned[e] - known.per_expert[e];", "differs", race_detector=False),
    Bug("report-counts-of-one-source", "phases/report.cuh", "out.per_expert_end[e] = start + count;",
        "out.per_expert_end[e] = tables.expert_row[experts_per_rank + e];", "differs", race_detector=False),
    Bug("statistics-by-every-block", "kernels/dispatch.cuh", "if (receiver && good && receivers.own() == 0) {",
        "if (receiver && good) {", "", num_sms=TWO_SENDERS),
    Bug("one-unused-row-unsaid", "phases/blank.cuh", "int64_t(used_rows) * columns + thread",
        "int64_t(used_rows + 1) * columns + thread", "", race_detector=False),
    Bug("rows-of-the-column-before", "phases/results.cuh", "(num_topk + 2) + 2 + k]", "(num_topk + 2) + 1 + k]", "",
        combining=SUMS, race_detector=False),
    Bug("second-row-first", "phases/sum.cuh", "      add(rows[0]);\n",
        "      if (count > 1) add(rows[1]), rows[1] = rows[0];\n      if (count == 1) add(rows[0]);\n",
        "differs", combining=EVERY_ROW, race_detector=False),
    # From one operation to the next.
    Bug(
        "plan-words-of-all-epochs-in-one-place",
        "phases/agree.cuh",
        "(epoch & 1) *",
        "0 *",
        DEADLOCK,
        num_tokens=0,
        race_detector=False,
        # One who asks late: the peer, of whom nothing comes, may have begun the next call by then.
        beside=(
            "kernels/dispatch.cuh",
            "  const bool all_agree = agree(",
            "  for (int i = 0; counts && i < 2000; ++i) device::sync_warp();\n  const bool all_agree = agree(",
        ),
    ),
    Bug("enter-unadmitted", "phases/admit.cuh", "seen == epoch ? epoch - 1 : seen;", "epoch - 1 + 0 * seen;", RACE),
    Bug("combine-unadmitted", "kernels/combine.cuh",
        "if (!admit_warp(a.window, epoch, a.patience)) return Announcer<kBy>(a.window, epoch, box).finish();",
        "", RACE),
    Bug("admit-relaxed", "phases/admit.cuh", "load_acquire_sys", "load_relaxed_sys", RACE),
    Bug("drained-relaxed", "phases/retire.cuh", "store_release_sys", "store_relaxed_sys", RACE),
    Bug("blocks-done-relaxed", "phases/retire.cuh", "fetch_add_acq_rel_gpu", "fetch_add_relaxed_gpu", RACE),
    Bug("retire-without-sync", "phases/retire.cuh", "  device::sync_block();\n", "", RACE),
    Bug("same-epoch-again", "phases/retire.cuh", "    device::store_relaxed_gpu(&own.epoch, epoch);\n", "", ""),
    Bug("claims-not-reset", "phases/retire.cuh", "device::store_relaxed_gpu(&claimed, 0u);",
        "static_cast<void>(claimed);", ""),
    Bug("blocks-done-not-reset", "phases/retire.cuh", "    device::store_relaxed_gpu(&own.blocks_done, 0u);\n", "", ""),
)  # fmt: skip


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
        if bug.beside is not None:
            _patch(include, bug.name, *bug.beside, times=1)
    race_detector = bug is None or bug.race_detector
    return PatchedGxx(race_detector=race_detector, include=include, more_include_dirs=(barriers.KERNELS,))


def _patch(include: Path, name: str, file: str, old: str, new: str, times: int) -> None:
    path = include / "deep_ep" / file
    text = path.read_text()
    if (count := text.count(old)) != times:
        raise ValueError(f"{name}: this stands {count} times in {file}, not {times}:\n{old}")
    path.write_text(text.replace(old, new))


def draw_story(seed: int, num_tokens: int, combining: combines.Options, num_sms: int) -> swarm.Story:
    """Short, and with everything in it that a bug may need: peers, several blocks, several operations under way."""
    r = random.Random(seed)
    many_rows = combining == EVERY_ROW  # of a token at one rank: the last ones leave long after the first
    drawn = tuple(
        cases.Case(
            seed=seed * 8 + idx,
            tokens=tuple(r.randint(num_tokens, num_tokens + 4) for _ in range(NUM_RANKS)),
            hidden=(hidden := 8 * r.choice([1, 8, 32])),
            num_topk=8 if many_rows else r.choice([2, 3]),
            num_experts=(8 if many_rows else 2) * NUM_RANKS,
            kind="random",
            alignment=r.choice([1, 4]),
            do_cpu_sync=False,
            with_weights=True,
            num_biases=idx % 2,
            num_sms=num_sms - (seed + 1) % 2,
            spare_tokens=0,
            options=Options(
                2 * hidden if (num_scales := 3 * (seed % 2)) else hidden,
                with_weights=True,
                num_scales=num_scales,  # not whole 16 bytes: lanes move them
                do_expand=r.random() < 0.5,
                do_zero_padding=True,
                with_stats=True,
            ),
            again=(Options(hidden, with_weights=True, do_expand=r.random() < 0.5, do_zero_padding=True),) * idx,
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
    num_seeds: int = MAX_SEEDS,
) -> tuple[int, str]:
    """Tell stories until one goes wrong.

    Returns:
        how many were told, and the error's text, empty if none did.
    """

    def tell(seed: int, world: World, toolchain: jit.Gxx) -> None:
        swarm.tell(draw_story(seed, num_tokens, combining, num_sms), world, toolchain)

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
        return find_error(toolchain, bug.num_tokens, bug.combining, bug.num_sms, bug.num_seeds)


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
