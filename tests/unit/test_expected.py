"""What a dispatch with CPU sync makes room for."""

from __future__ import annotations

import torch

from deep_ep.calls.expected import FEW_MORE_ROWS, FEW_ROWS, MARGIN, NO_LIMIT, NUM_LAST, SPREAD, Expected
from deep_ep.calls.host_counts import FIRST_COUNT, HostCounts
from deep_ep.calls.received import Sizes

WORST = Sizes(100_000, 1_000_000)


def after(*numbers: int, expand: bool = False) -> Sizes | None:
    """The room after dispatches that have brought so many tokens, and three times as many rows."""
    expected = Expected(WORST)
    for number in numbers:
        expected.note(Sizes(number, 3 * number))
    return expected.room(expand)


def test_nothing_is_expected_before_the_first_dispatch() -> None:
    assert after() is None


def test_a_little_more_than_what_came_lately() -> None:
    assert after(8000) == Sizes(8000 + 8000 // MARGIN, NO_LIMIT)
    assert after(8100, 8000, 7900) == Sizes(8100 + 8100 // MARGIN, NO_LIMIT)
    assert after(5, 0) == Sizes(5 + FEW_MORE_ROWS, NO_LIMIT)
    assert after(8000, expand=True) == Sizes(8000 + 8000 // MARGIN, 24000 + 24000 // MARGIN)


def test_nothing_where_numbers_vary() -> None:
    most = 8000 + 8000 // SPREAD
    assert after(8000, most) is not None
    assert after(8000, most + 1) is None
    assert after(8000, most + 1, *[8000] * NUM_LAST) is not None, "it is long ago"
    assert after(0, FEW_ROWS) is not None, "their memory does not matter"
    assert after(0, FEW_ROWS + 1) is None
    assert after(0, FEW_ROWS, expand=True) is None, "three times as many rows"


def test_never_more_than_the_worst_case() -> None:
    assert after(WORST.tokens - 1) == Sizes(WORST.tokens, NO_LIMIT)
    assert after(WORST.expanded // 3, expand=True) == WORST


def test_room_holds_what_is_no_more_in_either_number() -> None:
    room = Sizes(3, 8)
    assert room.hold(room)
    assert room.hold(Sizes(0, 0))
    assert not room.hold(Sizes(4, 8))
    assert not room.hold(Sizes(3, 9))


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
