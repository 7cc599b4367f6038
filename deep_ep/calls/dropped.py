"""Endpoints of buffers that were dropped without destroy().

Garbage is collected at any moment and on any thread. To wait for the device there, or to free memory, may end a CUDA
graph capture on another thread. So nothing is freed then; a later call does it.
"""

from __future__ import annotations

import atexit
from typing import Protocol

from deep_ep.calls.owner import Owner


class Dropped(Protocol):
    """What an Endpoint has for this."""

    owner: Owner

    def is_captured(self) -> bool:
        """Whether a CUDA graph is being captured on the current stream."""

    def give_back(self, together: bool) -> None:
        """Free everything; raises nothing."""


ABANDONED: list[Dropped] = []  # whose memory is kept to the process's end
PARKED: list[Dropped] = []  # whose memory free_parked() gives back


def free_parked() -> None:
    """Give back what dropped buffers had, unless a CUDA graph is being captured here: then a later call does it."""
    for endpoint in PARKED.copy():
        if endpoint.owner.is_elsewhere or endpoint.is_captured():
            continue
        try:
            PARKED.remove(endpoint)
        except ValueError:  # another thread was faster
            continue
        endpoint.give_back(together=False)


atexit.register(free_parked)
