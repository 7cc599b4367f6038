"""How much room dispatches with CPU sync make before they know what comes: what no user can choose, and tests draw."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from deep_ep.calls.expected import NO_LIMIT, Expected, Room
from deep_ep.calls.received import Sizes

_drawn = threading.local()  # ranks may be threads
_expected = Expected.room


@contextmanager
def drawn(seed: str, coming: Sizes) -> Iterator[None]:
    """The context of dispatches of this thread whose room has nothing to do with what has come before.

    Args:
        coming: what is to come.
    """
    _drawn.rule = random.Random(seed), coming
    try:
        yield
    finally:
        del _drawn.rule


def _room(self: Expected, expand: bool) -> Room | None:
    rule: tuple[random.Random, Sizes] | None = getattr(_drawn, "rule", None)
    if rule is None:
        return _expected(self, expand)
    r, (tokens, expanded) = rule
    worst = self._worst
    rooms = {
        "none": None,
        "for nothing": (0, 0),
        "just enough": (tokens, expanded),
        "a token too few": (max(0, tokens - 1), expanded),
        "a row too few": (tokens, max(0, expanded - 1)),
        "some": (r.randint(0, worst.tokens), r.randint(0, worst.expanded)),
        "for the worst case": worst,
    }
    room = rooms[r.choice(list(rooms))]
    if room is None:
        return None
    # Often far below what comes, and sometimes just there, or just above.
    least = [r.choice([0, 0, 0, number, number + 1]) for number in (tokens, expanded)]
    most = Sizes(room[0], room[1] if expand else NO_LIMIT)
    return Room(most, Sizes(least[0], least[1] if expand else 0))


Expected.room = _room  # type: ignore[method-assign]
