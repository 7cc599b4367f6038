"""How much the next dispatch brings, going by those before it: so it need not wait until the host knows."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from deep_ep.calls.received import Sizes

NUM_LAST = 8  # dispatches that it goes by
SPREAD = 8  # their numbers of rows may differ by this part of the least of them,
FEW_ROWS = 128  # or by so many, whose memory does not matter
MARGIN = 32  # this part of the most of them is added, or
FEW_MORE_ROWS = 16
SPARE, FEW_SPARE_ROWS = 7, 192  # no more than this part of the room may be left empty, or so many rows
NO_LIMIT = 2**31 - 1


class Room(NamedTuple):
    """Memory for what comes. It stays with the tensors as long as they live, so it must not be much too large."""

    most: Sizes
    least: Sizes
    """Fewer are none of its business."""

    def holds(self, sizes: Sizes) -> bool:
        """Whether they are received into it; include/deep_ep/phases/room.cuh finds the same."""
        (tokens, expanded), least, most = sizes, self.least, self.most
        return least.tokens <= tokens <= most.tokens and least.expanded <= expanded <= most.expanded


class Expected:
    """What dispatches of one shape bring this rank.

    Where numbers vary nothing is expected: then the host waits for the counts, and makes room for just as much.
    """

    def __init__(self, worst: Sizes) -> None:
        self._worst = worst
        self._last: deque[Sizes] = deque(maxlen=NUM_LAST)

    def note(self, sizes: Sizes) -> None:
        """What the latest dispatch has brought."""
        self._last.append(sizes)

    def room(self, expand: bool) -> Room | None:
        """What should hold all that the next one brings, or None. Without ``expand`` there is no limit to rows of the
        expanded layout, which take no memory then."""
        tokens = _most([each.tokens for each in self._last], self._worst.tokens)
        expanded = _most([each.expanded for each in self._last], self._worst.expanded) if expand else NO_LIMIT
        if tokens is None or expanded is None:
            return None
        return Room(Sizes(tokens, expanded), Sizes(least_of(tokens), least_of(expanded) if expand else 0))


def _most(numbers: list[int], worst: int) -> int | None:
    """What a number like these will hardly exceed, or None if nobody can tell."""
    if not numbers:
        return None
    least, most = min(numbers), max(numbers)
    if most - least > max(least // SPREAD, FEW_ROWS):
        return None
    return min(most + max(most // MARGIN, FEW_MORE_ROWS), worst)


def least_of(most: int) -> int:
    """The fewest rows that may have room for so many. Any that ``_most`` goes by are no fewer."""
    return max(0, most - max(most // SPARE, FEW_SPARE_ROWS))
