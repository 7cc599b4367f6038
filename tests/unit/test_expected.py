"""What a dispatch with CPU sync makes room for."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from deep_ep.calls.expected import (
    FEW_MORE_ROWS,
    FEW_ROWS,
    FEW_SPARE_ROWS,
    MARGIN,
    NO_LIMIT,
    NUM_LAST,
    SPARE,
    SPREAD,
    Expected,
    Room,
    least_of,
)
from deep_ep.calls.host_counts import FIRST_COUNT, HostCounts
from deep_ep.calls.received import Sizes

WORST = Sizes(100_000, 1_000_000)


def after(*numbers: int, expand: bool = False) -> Room | None:
    """The room after dispatches that have brought so many tokens, and three times as many rows."""
    expected = Expected(WORST)
    for number in numbers:
        expected.note(Sizes(number, 3 * number))
    return expected.room(expand)


def most_after(*numbers: int) -> int | None:
    """Tokens, in the plain layout."""
    room = after(*numbers)
    if room is None:
        return None
    assert (room.most.expanded, room.least.expanded) == (NO_LIMIT, 0), "which take no memory"
    return room.most.tokens


def test_nothing_is_expected_before_the_first_dispatch() -> None:
    assert after() is None


def test_a_little_more_than_what_came_lately() -> None:
    assert most_after(8000) == 8000 + 8000 // MARGIN
    assert most_after(8100, 8000, 7900) == 8100 + 8100 // MARGIN
    assert most_after(5, 0) == 5 + FEW_MORE_ROWS
    room = after(8000, expand=True)
    assert room is not None
    assert room.most == Sizes(8000 + 8000 // MARGIN, 24000 + 24000 // MARGIN)
    assert room.least == Sizes(least_of(room.most.tokens), least_of(room.most.expanded))


def test_nothing_where_numbers_vary() -> None:
    most = 8000 + 8000 // SPREAD
    assert after(8000, most) is not None
    assert after(8000, most + 1) is None
    assert after(8000, most + 1, *[8000] * NUM_LAST) is not None, "it is long ago"
    assert after(0, FEW_ROWS) is not None, "their memory does not matter"
    assert after(0, FEW_ROWS + 1) is None
    assert after(0, FEW_ROWS, expand=True) is None, "three times as many rows"


def test_never_more_than_the_worst_case() -> None:
    assert most_after(WORST.tokens - 1) == WORST.tokens
    room = after(WORST.expanded // 3, expand=True)
    assert room is not None
    assert room.most == WORST


@given(st.lists(st.integers(0, 20_000), min_size=1, max_size=2 * NUM_LAST))
def test_what_came_lately_may_come_again(numbers: list[int]) -> None:
    """And memory that is kept for nothing has a limit."""
    room = after(*numbers)
    for number in numbers[-NUM_LAST:]:
        assert room is None or room.holds(Sizes(number, 3 * number))
    if room is not None:
        least, most = room.least.tokens, room.most.tokens
        assert most <= max(least + least / (SPARE - 1) + 1, least + FEW_SPARE_ROWS)


def test_room_holds_what_is_neither_more_nor_far_less() -> None:
    room = Room(Sizes(3, 8), Sizes(1, 4))
    held = {(tokens, rows) for tokens in range(6) for rows in range(12) if room.holds(Sizes(tokens, rows))}
    assert held == set(itertools.product((1, 2, 3), (4, 5, 6, 7, 8)))


def test_counts_that_the_host_is_told() -> None:
    class Words:
        tensor = torch.full([HostCounts.num_words(1)], 7, dtype=torch.int32)
        address = tensor.data_ptr()

    counts = HostCounts(Words)
    assert counts.have_come()
    assert counts.expect() == Words.address
    assert not counts.have_come()
    Words.tensor[: FIRST_COUNT + 3] = torch.tensor([1, 9, 0, 8, 5])
    assert counts.have_come()
    rows, selections, total = counts.read(3, 4)
    assert (rows, selections.tolist(), total) == (9, [0, 8, 8], 16)
