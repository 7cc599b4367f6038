"""Whose a buffer is: of the process that built it, and of one thread at a time."""

from __future__ import annotations

import os
import threading


class Owner:
    """The process that makes it.

    Attributes:
        turn: held by the thread whose call is under way; others wait. The same thread may come in again: a handler of
            a signal may destroy the buffer in the midst of a call.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self.turn = threading.RLock()

    @property
    def is_elsewhere(self) -> bool:
        """Whether this process is a forked child of it; then nothing is this one's to use, to wait for or to free."""
        return os.getpid() != self._process

    def require_here(self) -> None:
        """Raise ValueError in a forked child."""
        if self.is_elsewhere:
            raise ValueError(
                f"this buffer belongs to process {self._process}, of which this one is a fork: it cannot be used here"
            )
