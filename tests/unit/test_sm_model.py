"""The model of SMs against what was measured: its choice is as good as the best of each sweep, and not much above the
fewest that would be."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deep_ep import sm_model
from deep_ep.layout import MAX_RANKS, MAX_TOPK
from deep_ep.sm_model import Kind, Speeds, num_sms

WITHIN = 0.05
H200 = Speeds()
H100 = Speeds.of(None, 18 * 26.5625, 3352.0)

LINK_GBS = 361.0  # of the copy engine, as both runs saw it
ROWS_SENT = {4096: 4080, 8192: 8160}  # 2 ranks, top-8 of 256
FP8, BF16 = 7168 + 56 * 4, 2 * 7168  # bytes that a row takes on the link


@dataclass(frozen=True)
class Sweep:
    """Microseconds end to end by SMs: medians, of the slower rank."""

    name: str
    kind: Kind
    tokens: int
    row_bytes: int
    times: dict[int, float]
    speeds: Speeds = H200

    @property
    def link_us(self) -> float:
        return ROWS_SENT[self.tokens] * self.row_bytes / LINK_GBS / 1e3


# 2 x H200 of one host, 2026-11-26, commit d555ef8, 15 iterations; the tables of docs/performance.md. That commit's sums
# of expanded rows were other kernels, so what it read of them is not here.
SWEEPS = [
    Sweep("dispatch", Kind.DISPATCH, 4096, FP8, {16: 175.9, 24: 128.9, 48: 111.9}),
    Sweep("dispatch, cached", Kind.DISPATCH, 4096, FP8, {16: 160.3, 24: 116.6, 48: 112.4}),
    Sweep("dispatch, expanded", Kind.EXPANDED_DISPATCH, 4096, FP8, {16: 387.8, 24: 268.9, 48: 152.5}),
    Sweep("dispatch, cached expanded", Kind.EXPANDED_DISPATCH, 4096, FP8, {16: 374.4, 24: 259.3, 48: 142.7}),
    Sweep("dispatch bf16", Kind.DISPATCH, 4096, BF16, {16: 290.0, 24: 206.2, 48: 191.6}),
    Sweep("combine", Kind.COMBINE, 4096, BF16, {16: 212.4, 24: 195.7, 48: 199.6}),
    Sweep("dispatch", Kind.DISPATCH, 8192, FP8, {16: 326.5, 24: 229.3, 48: 195.7}),
    Sweep("dispatch, cached", Kind.DISPATCH, 8192, FP8, {16: 300.7, 24: 209.0, 48: 196.1}),
    Sweep("dispatch, expanded", Kind.EXPANDED_DISPATCH, 8192, FP8, {16: 715.2, 24: 494.3, 48: 274.9}),
    Sweep("dispatch, cached expanded", Kind.EXPANDED_DISPATCH, 8192, FP8, {16: 692.9, 24: 477.6, 48: 261.7}),
    Sweep("dispatch bf16", Kind.DISPATCH, 8192, BF16, {16: 555.7, 24: 384.3, 48: 354.2}),
    Sweep("combine", Kind.COMBINE, 8192, BF16, {16: 402.8, 24: 355.6, 48: 360.7}),
]
# The same kind of host and day, the kernels after notes 27 to 33 of docs/experiments.md, which land labels by warps of
# their own. Sums of expanded rows were still others.
LATER = [
    Sweep("later dispatch", Kind.DISPATCH, 4096, FP8, {16: 168.1, 24: 117.0, 48: 110.3}),
    Sweep("later dispatch, expanded", Kind.EXPANDED_DISPATCH, 4096, FP8, {16: 369.7, 24: 255.9, 48: 144.3}),
    Sweep("later dispatch, cached expanded", Kind.EXPANDED_DISPATCH, 4096, FP8, {16: 358.9, 24: 246.6, 48: 134.0}),
    Sweep("later dispatch, in place", Kind.DISPATCH_IN_PLACE, 4096, FP8, {16: 125.1, 24: 119.7, 48: 120.0}),
    Sweep("later dispatch bf16", Kind.DISPATCH, 4096, BF16, {16: 296.9, 24: 202.6, 48: 194.2}),
    Sweep("later combine", Kind.COMBINE, 4096, BF16, {16: 210.3, 24: 196.5, 48: 200.7}),
    Sweep("later combine, in place", Kind.COMBINE_IN_PLACE, 4096, BF16, {16: 213.9, 24: 193.1, 48: 190.5}),
]
# Again, 882b192, after notes 34 to 40.
LATEST = [
    Sweep("latest dispatch", Kind.DISPATCH, 4096, FP8, {16: 167.5, 24: 116.8, 48: 110.5, 68: 110.8}),
    Sweep("latest dispatch, cached", Kind.DISPATCH, 4096, FP8, {16: 156.9, 24: 111.6, 48: 114.8, 68: 111.7}),
    Sweep("latest dispatch, expanded", Kind.EXPANDED_DISPATCH, 4096, FP8, {16: 368.2, 24: 255.7, 48: 145.1, 68: 126.4}),
    Sweep(
        "latest dispatch, cached expanded",
        Kind.EXPANDED_DISPATCH,
        4096,
        FP8,
        {16: 357.0, 24: 245.2, 48: 133.5, 68: 119.2},
    ),
    Sweep("latest dispatch, in place", Kind.DISPATCH_IN_PLACE, 4096, FP8, {16: 124.4, 24: 120.7, 48: 121.0, 68: 122.0}),
    Sweep("latest dispatch bf16", Kind.DISPATCH, 4096, BF16, {16: 297.5, 24: 202.4, 48: 192.2, 68: 190.9}),
    Sweep("latest combine", Kind.COMBINE, 4096, BF16, {16: 212.2, 24: 197.6, 48: 200.7, 68: 200.1}),
    Sweep("latest combine, in place", Kind.COMBINE_IN_PLACE, 4096, BF16, {16: 213.6, 24: 193.7, 48: 191.1, 68: 190.8}),
    Sweep("latest combine, expanded", Kind.COMBINE_OF_SUMS, 4096, BF16, {16: 534.8, 24: 382.0, 48: 284.2, 68: 284.0}),
]
# 2 x H100 of one host, 2026-11-26, the kernels of dab7f5d, 30 iterations (benchmarks.ep --check-model).
ON_H100 = [
    Sweep(f"H100 {name}", kind, tokens, row_bytes, times, H100)
    for name, kind, tokens, row_bytes, times in [
        ("dispatch", Kind.DISPATCH, 4096, FP8, {16: 172.0, 24: 126.5, 28: 117.1, 32: 110.9, 48: 111.6, 64: 112.0}),
        ("dispatch, cached", Kind.DISPATCH, 4096, FP8, {16: 156.6, 24: 117.4, 28: 110.7, 32: 113.1, 48: 115.1}),
        (
            "dispatch, expanded",
            Kind.EXPANDED_DISPATCH,
            4096,
            FP8,
            {16: 371.6, 24: 277.8, 32: 215.6, 48: 174.1, 50: 170.7, 64: 166.6, 96: 167.5},
        ),
        (
            "dispatch, cached expanded",
            Kind.EXPANDED_DISPATCH,
            4096,
            FP8,
            {16: 358.3, 24: 267.9, 32: 205.2, 48: 158.0, 50: 157.2, 64: 155.4, 96: 156.4},
        ),
        ("in place", Kind.DISPATCH_IN_PLACE, 4096, FP8, {16: 128.2, 20: 124.4, 24: 123.2, 32: 124.0, 48: 125.5}),
        ("dispatch bf16", Kind.DISPATCH, 4096, BF16, {16: 299.9, 24: 215.2, 28: 194.4, 32: 191.1, 48: 192.8}),
        ("combine", Kind.COMBINE, 4096, BF16, {16: 214.4, 22: 197.7, 24: 198.3, 32: 203.6, 48: 205.5}),
        ("combine, in place", Kind.COMBINE_IN_PLACE, 4096, BF16, {16: 216.9, 22: 196.9, 24: 195.5, 32: 193.6}),
        (
            "combine, expanded",
            Kind.COMBINE_OF_SUMS,
            4096,
            BF16,
            {16: 569.2, 24: 412.0, 32: 341.3, 38: 317.4, 48: 307.4, 64: 316.7, 96: 338.0},
        ),
        ("dispatch", Kind.DISPATCH, 8192, FP8, {16: 323.2, 24: 230.0, 28: 210.8, 32: 196.2, 48: 199.7, 64: 195.9}),
        ("dispatch, cached", Kind.DISPATCH, 8192, FP8, {16: 299.2, 24: 211.8, 28: 199.5, 32: 197.2, 64: 197.1}),
        (
            "dispatch, expanded",
            Kind.EXPANDED_DISPATCH,
            8192,
            FP8,
            {16: 720.2, 24: 539.0, 32: 406.6, 48: 317.9, 50: 312.0, 64: 308.4, 96: 309.2},
        ),
        ("dispatch bf16", Kind.DISPATCH, 8192, BF16, {16: 578.0, 24: 405.8, 28: 369.6, 32: 351.5, 48: 355.4}),
        ("combine", Kind.COMBINE, 8192, BF16, {16: 395.7, 22: 357.3, 24: 357.0, 32: 361.7, 48: 370.9}),
        (
            "combine, expanded",
            Kind.COMBINE_OF_SUMS,
            8192,
            BF16,
            {16: 1082.7, 24: 762.1, 32: 617.6, 38: 565.9, 48: 542.0, 64: 550.3, 96: 590.2},
        ),
    ]
]
# The same day, the kernels of e6e6074, calls that an H100's memory limits. They differ from run to run: here is the one
# in which 52 SMs, the model's number then, were the furthest from the best, and one with today's 62 and 48.
BY_MEMORY = [
    Sweep(f"H100 {run} {name}", kind, tokens, row_bytes, times, H100)
    for run, name, kind, tokens, row_bytes, times in [
        (
            "with 52:",
            "dispatch, expanded",
            Kind.EXPANDED_DISPATCH,
            8192,
            FP8,
            {16: 721.1, 24: 531.7, 32: 403.8, 48: 320.1, 52: 334.0, 64: 304.9, 96: 308.0},
        ),
        (
            "with 62:",
            "dispatch, expanded",
            Kind.EXPANDED_DISPATCH,
            8192,
            FP8,
            {16: 721.2, 24: 531.2, 32: 403.7, 48: 318.1, 62: 304.8, 64: 305.2, 96: 307.5},
        ),
        (
            "with 62:",
            "dispatch, cached expanded",
            Kind.EXPANDED_DISPATCH,
            8192,
            FP8,
            {16: 703.2, 24: 522.4, 32: 394.8, 48: 307.1, 62: 297.5, 64: 299.4, 96: 303.0},
        ),
        (
            "with 62:",
            "dispatch, expanded",
            Kind.EXPANDED_DISPATCH,
            4096,
            FP8,
            {16: 370.7, 24: 275.6, 32: 212.4, 48: 169.0, 62: 162.0, 64: 161.0, 96: 163.2},
        ),
        (
            "with 48:",
            "combine, expanded",
            Kind.COMBINE_OF_SUMS,
            8192,
            BF16,
            {16: 1083.9, 24: 762.6, 32: 617.7, 48: 541.9, 64: 551.3, 96: 590.2},
        ),
    ]
]
ALL = pytest.mark.parametrize(
    "sweep", [*SWEEPS, *LATER, *LATEST, *ON_H100, *BY_MEMORY], ids=lambda sweep: f"{sweep.name} {sweep.tokens}"
)


def law(sweep: Sweep, sms: int) -> float:
    """What a call takes by fixed + max(work / n, link), where it was not measured, and no more than by a straight line.

    Fixed and work are those of the two fewest SMs. Where more of them were no faster the limit is the least time, and
    where the last ones still were, the time goes on to fall until the link is the limit: from the last one measured on.
    """
    (few, slow), (more, fast), *_ = sorted(sweep.times.items())
    work = (slow - fast) / (1 / few - 1 / more)
    fixed, least, last = slow - work / few, min(sweep.times.values()), max(sweep.times)
    if sms in sweep.times:
        return sweep.times[sms]
    if sms > last:
        left = (fixed + max(work / sms, sweep.link_us)) / (fixed + max(work / last, sweep.link_us))
        return min(least, sweep.times[last] * left)
    return min(max(fixed + work / sms, least), straight(sweep, sms))


def straight(sweep: Sweep, sms: int) -> float:
    """The most that a call may take between two measured times: straight over 1 / n, since times bend downwards."""
    if sms >= max(sweep.times):
        return sweep.times[max(sweep.times)]
    few, more = max(n for n in sweep.times if n <= sms), min(n for n in sweep.times if n > sms)
    part = (1 / few - 1 / sms) / (1 / few - 1 / more)
    return sweep.times[few] + part * (sweep.times[more] - sweep.times[few])


def choice(sweep: Sweep) -> int:
    return num_sms(sweep.kind, 2, 8, sweep.speeds)


def is_by_memory(sweep: Sweep) -> bool:
    return sweep.speeds.memory / sm_model.work_of(sweep.kind, 2, 8).memory < sweep.speeds.link


@ALL
def test_the_choice_is_as_good_as_the_best(sweep: Sweep) -> None:
    """Of those that were measured, and of all that the device has."""
    taken = law(sweep, choice(sweep))
    assert taken <= min(sweep.times.values()) * (1 + WITHIN)
    assert taken <= min(law(sweep, sms) for sms in range(choice(sweep), 133)) * (1 + WITHIN)


@ALL
def test_no_choice_is_far_off_whatever_lies_between(sweep: Sweep) -> None:
    """Dispatch was measured with 24 and with 48 SMs, and the choice is between: nobody has seen where the bend is."""
    assert straight(sweep, choice(sweep)) <= min(sweep.times.values()) * 1.13


@ALL
def test_fewer_would_not_do(sweep: Sweep) -> None:
    """SMs are taken from who computes. The law may say too few, since times bend slowly; straight lines too many. Where
    memory is the limit the model takes more on purpose: 48 SMs were enough for an expanded dispatch in most runs."""
    enough = min(law(sweep, 132), *sweep.times.values()) * (1 + WITHIN)
    fewest = min(sms for sms in range(min(sweep.times), 133) if law(sweep, sms) <= enough)
    surely = min((sms for sms in range(min(sweep.times), 133) if straight(sweep, sms) <= enough), default=fewest)
    assert fewest <= choice(sweep) <= 1.25 * surely * (sm_model.BEYOND_THE_BEND if is_by_memory(sweep) else 1)


# Of few tokens, in a CUDA graph; 2026-11-26, f901b22, of the slower rank.
FEW = {
    (Kind.COMBINE, 32): {16: 11.3, 22: 10.7, 32: 11.1, 48: 11.3},
    (Kind.COMBINE, 64): {16: 13.7, 22: 14.2, 32: 12.5, 48: 12.3},
    (Kind.COMBINE, 128): {16: 20.5, 22: 19.3, 32: 17.0, 48: 16.6},
    (Kind.COMBINE, 256): {16: 32.4, 22: 29.6, 32: 26.0, 48: 25.0},
    (Kind.COMBINE_IN_PLACE, 32): {16: 11.9, 22: 11.6, 32: 11.6, 48: 11.6},
    (Kind.COMBINE_IN_PLACE, 64): {16: 14.6, 22: 14.6, 32: 13.7, 48: 13.1},
    (Kind.COMBINE_IN_PLACE, 128): {16: 17.9, 22: 16.3, 32: 16.6, 48: 17.1},
    (Kind.COMBINE_IN_PLACE, 256): {16: 28.2, 22: 23.9, 32: 21.6, 48: 21.3},
}
# The same on two H100, 2026-11-26: sums of dab7f5d, combines of e6e6074, dispatches of the same kernels in another run.
FEW_ON_H100 = {
    (Kind.DISPATCH, 64): {48: 15.2, 56: 15.3, 64: 15.2, 72: 15.3, 80: 15.4, 96: 15.4},
    (Kind.DISPATCH, 128): {48: 16.5, 56: 16.5, 64: 16.4, 72: 16.6, 80: 16.6, 96: 16.5},
    (Kind.DISPATCH, 256): {48: 20.2, 56: 19.9, 64: 19.7, 72: 19.9, 80: 19.6, 96: 19.2},
    (Kind.DISPATCH, 512): {48: 26.8, 56: 26.5, 64: 25.9, 72: 25.8, 80: 25.6, 96: 24.8},
    (Kind.EXPANDED_DISPATCH, 64): {48: 17.0, 56: 16.7, 64: 16.8, 72: 16.5, 80: 16.5, 96: 16.4},
    (Kind.EXPANDED_DISPATCH, 128): {48: 19.5, 56: 19.3, 64: 19.3, 72: 18.8, 80: 18.4, 96: 18.6},
    (Kind.EXPANDED_DISPATCH, 256): {48: 24.8, 56: 24.4, 64: 23.8, 72: 22.7, 80: 22.5, 96: 22.2},
    (Kind.EXPANDED_DISPATCH, 512): {48: 37.5, 56: 32.6, 64: 32.4, 72: 31.2, 80: 30.6, 96: 29.4},
    (Kind.COMBINE, 128): {16: 22.5, 24: 20.6, 32: 18.6, 48: 18.7, 64: 18.2, 96: 18.5},
    (Kind.COMBINE_IN_PLACE, 128): {16: 20.9, 24: 19.0, 32: 19.2, 48: 19.6, 64: 19.0, 96: 19.5},
    (Kind.COMBINE_OF_SUMS, 64): {24: 27.2, 32: 26.8, 48: 24.8, 64: 24.0, 96: 24.5},
    (Kind.COMBINE_OF_SUMS, 128): {24: 34.1, 32: 32.6, 48: 29.0, 64: 28.6, 96: 27.9},
    (Kind.COMBINE_OF_SUMS, 512): {24: 87.9, 32: 82.8, 48: 71.8, 64: 57.1, 96: 58.4},
}
# By a handle; 512 expanded are left out, of which a quarter took 46 us with 80 SMs.
CACHED_ON_H100 = {
    (Kind.DISPATCH, 64): {48: 13.8, 56: 13.7, 64: 14.0, 72: 14.2, 80: 14.2, 96: 14.1},
    (Kind.DISPATCH, 128): {48: 15.8, 56: 15.7, 64: 15.8, 72: 15.7, 80: 15.6, 96: 15.0},
    (Kind.DISPATCH, 256): {48: 19.2, 56: 19.0, 64: 18.9, 72: 18.8, 80: 18.6, 96: 18.5},
    (Kind.DISPATCH, 512): {48: 26.7, 56: 26.3, 64: 25.8, 72: 25.8, 80: 25.5, 96: 26.4},
    (Kind.EXPANDED_DISPATCH, 64): {48: 16.3, 56: 15.7, 64: 15.4, 72: 15.5, 80: 15.5, 96: 14.8},
    (Kind.EXPANDED_DISPATCH, 128): {48: 18.8, 56: 18.3, 64: 17.8, 72: 17.7, 80: 17.5, 96: 18.7},
    (Kind.EXPANDED_DISPATCH, 256): {48: 23.7, 56: 22.7, 64: 22.1, 72: 21.8, 80: 21.4, 96: 20.9},
}


@pytest.mark.parametrize(
    ("kind", "tokens", "times"),
    [
        pytest.param(*key, times, id=f"{host} {key[0].value} {key[1]}")
        for host, few in (("H200", FEW), ("H100", FEW_ON_H100), ("H100, cached", CACHED_ON_H100))
        for key, times in few.items()
    ],
)
def test_the_choice_for_few_tokens(kind: Kind, tokens: int, times: dict[int, float]) -> None:
    few = sm_model.of_few(kind, tokens)
    if few == 0:  # whatever the law says
        assert tokens <= sm_model.VERY_FEW_TOKENS
        few = num_sms(kind, 2, 8, H200)
    assert times[few] <= min(times.values()) * (1 + WITHIN)


def test_many_tokens_take_what_their_bytes_take() -> None:
    """And so do very few. The others' numbers are those of the documentation."""
    for num_tokens in (1, sm_model.VERY_FEW_TOKENS, sm_model.FEW_TOKENS + 1):
        assert {sm_model.of_few(kind, num_tokens) for kind in Kind} == {0}
    few = [sm_model.of_few(kind, num_tokens) for num_tokens in (33, 512) for kind in Kind]
    assert few == 2 * [80, 80, 0, 0, 32, 32, 64, 0]


def test_numbers() -> None:
    """Those of the documentation."""
    by_kind = [[num_sms(kind, num_ranks, 8, H200) for kind in Kind] for num_ranks in (2, 4, 8)]
    assert by_kind == [
        [28, 68, 20, 60, 22, 22, 46, 16],
        [22, 32, 14, 24, 16, 16, 24, 14],
        [20, 24, 12, 16, 14, 14, 18, 14],
    ]


def test_work_of_two_ranks() -> None:
    """As the documentation counts it."""
    works = {kind: sm_model.work_of(kind, 2, 8) for kind in Kind}
    rounded = {kind: tuple(round(part, 1) for part in work) for kind, work in works.items()}
    assert rounded == {
        Kind.DISPATCH: (3.0, 0.0, 0.0, 3.0, 5.0),
        Kind.EXPANDED_DISPATCH: (3.0, 0.0, 0.0, 9.0, 11.0),
        Kind.DISPATCH_IN_PLACE: (2.0, 0.0, 0.0, 2.0, 4.0),
        Kind.EXPANDED_DISPATCH_IN_PLACE: (2.0, 0.0, 0.0, 8.0, 10.0),
        Kind.COMBINE: (3.0, 0.0, 0.0, 2.0, 4.0),
        Kind.COMBINE_IN_PLACE: (1.0, 1.0, 0.0, 1.0, 3.0),
        Kind.COMBINE_OF_SUMS: (1.0, 0.0, 8.0, 2.0, 10.0),
        Kind.COMBINE_OF_EVERY_ROW: (3.0, 0.0, 0.0, 1.2, 3.2),
    }


KINDS, RANKS, TOPKS = st.sampled_from(Kind), st.integers(1, MAX_RANKS), st.integers(1, MAX_TOPK)
GBS = st.floats(1, 5000)


@given(kind=KINDS, num_ranks=RANKS, num_topk=TOPKS, link=GBS, memory=GBS, load=GBS, store=GBS, add=GBS)
def test_any_machine(
    kind: Kind, num_ranks: int, num_topk: int, link: float, memory: float, load: float, store: float, add: float
) -> None:
    """A faster link or memory takes no fewer SMs, and faster SMs no more."""
    speeds = Speeds(link, memory, load, store, add)
    found = num_sms(kind, num_ranks, num_topk, speeds)
    assert found >= 4
    assert found % 2 == 0
    for name in ("link", "memory"):
        assert found <= num_sms(kind, num_ranks, num_topk, replace(speeds, **{name: 2 * getattr(speeds, name)}))
    for name in ("load", "store", "add"):
        assert found >= num_sms(kind, num_ranks, num_topk, replace(speeds, **{name: 2 * getattr(speeds, name)}))


@given(num_ranks=RANKS, num_topk=TOPKS)
def test_a_plain_dispatch_is_the_same_for_all_selections(num_ranks: int, num_topk: int) -> None:
    plain, expanded = Kind.DISPATCH, Kind.EXPANDED_DISPATCH
    assert num_sms(plain, num_ranks, num_topk, H200) == num_sms(plain, num_ranks, 1, H200)
    assert num_sms(expanded, num_ranks, num_topk, H200) >= num_sms(plain, num_ranks, num_topk, H200)


def test_memory_may_be_the_limit() -> None:
    """An H100's is, for expanded rows between two of them, sent or added."""
    assert H100.link == H200.link
    assert [num_sms(kind, 2, 8, H100) for kind in Kind] == [30, 62, 20, 60, 22, 22, 48, 18]


def test_speeds_of_a_machine() -> None:
    """What somebody has said, or what the machine tells, or an H200's."""
    assert Speeds.of(None, None, None) == H200
    same = Speeds.of(None, 18 * 26.5625, 4916.7)
    assert (same.link, same.memory) == (365.0, pytest.approx(4248.0))
    assert (H100.load, H100.store) == (
        pytest.approx(0.944 * H200.load, rel=1e-3),
        pytest.approx(0.944 * H200.store, rel=1e-3),
    )
    assert (H100.add, H100.fetch) == (
        pytest.approx(0.944 * H200.add, rel=1e-3),
        pytest.approx(0.944 * H200.fetch, rel=1e-3),
    )
    faster = Speeds.of(None, 18 * 53.125, 2 * 4916.7)
    assert (faster.load, faster.store, faster.add, faster.fetch) == (H200.load, H200.store, H200.add, H200.fetch)
    assert (faster.link, faster.memory) == (730.0, pytest.approx(8496.0))
    assert Speeds.of(100.0, 18 * 53.125, None).link == 100.0


def test_what_the_caller_knows_better() -> None:
    assert H200.as_told(0, 200, 50) == H200
    told = H200.as_told(730, 100, 100)
    assert told == Speeds(730.0, H200.memory, H200.load / 2, H200.store * 2, H200.add / 2, H200.fetch / 2)


@pytest.mark.parametrize("most", [1, 5, 132])
def test_table(most: int) -> None:
    table = sm_model.table(2, H200, most)
    for kind in Kind:
        assert len(table[kind]) == MAX_TOPK + 1
        assert table[kind][8] == min(most, num_sms(kind, 2, 8, H200))
        assert table[kind][0] == table[kind][1]
