"""How much the next dispatch brings, going by those before it: so it need not wait until the host knows."""

from __future__ import annotations

from collections import deque

from deep_ep.calls.received import Sizes

NUM_LAST = 8  # dispatches that it goes by
SPREAD = 8  # their numbers of rows may differ by this part of the least of them,
FEW_ROWS = 128  # or by so many, whose memory does not matter
MARGIN = 32  # this part of the most of them is added, or
FEW_MORE_ROWS = 16
NO_LIMIT = 2**31 - 1


class Expected:
    """What dispatches of one shape bring this rank.

    Room for more than what comes stays with the tensors as long as they live. So nothing is expected where numbers
    vary: then the host waits for the counts, and makes room for just as much.
    """

    def __init__(self, worst: Sizes) -> None:
        self._worst = worst
        self._last: deque[Sizes] = deque(maxlen=NUM_LAST)

    def note(self, sizes: Sizes) -> None:
        """What the latest dispatch has brought."""
        self._last.append(sizes)

    def room(self, expand: bool) -> Sizes | None:
        """What should hold all that the next one brings, or None. Without ``expand`` there is no limit to rows of the
        expanded layout, which take no memory then."""
        tokens = _most([each.tokens for each in self._last])
        if tokens is None:
            return None
        tokens = min(tokens, self._worst.tokens)
        if not expand:
            return Sizes(tokens, NO_LIMIT)
        expanded = _most([each.expanded for each in self._last])
        return None if expanded is None else Sizes(tokens, min(expanded, self._worst.expanded))


def _most(numbers: list[int]) -> int | None:
    """What a number like these will hardly exceed, or None if nobody can tell."""
    if not numbers:
        return None
    least, most = min(numbers), max(numbers)
    if most - least > max(least // SPREAD, FEW_ROWS):
        return None
    return most + max(most // MARGIN, FEW_MORE_ROWS)
