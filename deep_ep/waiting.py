"""Waits of the host for what may never come: patient, interruptible, with a word about it in time, and not forever."""

from __future__ import annotations

import select
import time
from collections.abc import Callable

BUSY_SECONDS = 0.0005  # so long it does nothing but look; whoever wants the GIL gets it as from any other code
EAGER_SECONDS = 0.01  # so long it looks all the time, and lets others run between
LAZY_SHARE, LAZY_SECONDS = 0.01, 0.02  # then it sleeps for a part of what it has waited already, and at most so long
NOTICE_SHARE, NOTICE_SECONDS = 0.25, 30.0  # it gives notice after this part of its limit, and at the latest by then


def notice_seconds(limit_s: float) -> float:
    """After how long somebody who waits at most ``limit_s`` says so."""
    return min(NOTICE_SHARE * limit_s, NOTICE_SECONDS)


class Watch:
    """One wait: ``while not it_has_come(): if watch.is_over: raise ...; watch.pause()``.

    Args:
        limit_s: seconds that it may take.
        notice: called with the seconds so far when it takes long, before the limit and then ever less often.
    """

    def __init__(self, limit_s: float, notice: Callable[[float], None] | None = None) -> None:
        self.limit_s = limit_s
        self._notice = notice
        self._next_notice_s = notice_seconds(limit_s)
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._start

    @property
    def is_over(self) -> bool:
        return self.seconds > self.limit_s

    def pause(self) -> None:
        """Between two looks: give notice when it is time, and, after the first moments, sleep a little, so that other
        threads get the GIL. Ctrl-C gets through."""
        seconds = self.seconds
        if self._notice is not None and seconds >= self._next_notice_s:
            self._next_notice_s = 2 * seconds
            self._notice(seconds)
        if seconds < BUSY_SECONDS:
            return
        if seconds < EAGER_SECONDS:
            select.select((), (), (), 0)  # in Python 3.11.7 it took 0.7 us, and time.sleep(0) 80
        else:
            time.sleep(min(LAZY_SHARE * seconds, LAZY_SECONDS))
