"""When a call of a case runs: events before it, streams beside it, and tensors that may not be looked at too early.

On a GPU, what a call is given holds no numbers until late, on the stream or before the event that the call must wait
for; and memory of what it was given is written over as soon as the caller has let go of it. So a call that waits for
the wrong thing, or for nothing, returns something else than the oracle. On simulated ranks all of it is inert, but that
registered memory is written in the order of the calls, and written over as soon as a call has ended.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deep_ep import EventHandle, EventOverlap
from tests.elastic.registered import Home

GIVEN, EMPTY = "given", "empty"
LATE, LATER = 50_000, 300_000  # clocks of the GPU: some 30 and 170 us


@dataclass(frozen=True)
class Timing:
    """Arguments of a call. Events are given, left out (None), or empty: what a synchronous call has returned."""

    previous_event: str | None = None
    before_epilogue: str | None = None
    asynchronous: bool = False
    on_comm_stream: bool = False


AT_ONCE = Timing()


class Moment:
    """One call's timing: hand over what the call is to read, make the call with arguments(), then began() and at last
    end()."""

    def __init__(self, timing: Timing, device: torch.device) -> None:
        self.timing = timing
        self._on_gpu = device.type == "cuda"
        self._beside = _stream_beside(device) if self._on_gpu else None
        self._epilogue: EventHandle | None = None
        self._event: EventOverlap | None = None
        self._given: list[torch.Tensor] = []
        self._homes: list[Home] = []  # which may be written again when the call has ended

    def late(self, *given: torch.Tensor | None, homes: Sequence[Home | None] = ()) -> tuple[torch.Tensor | None, ...]:
        """The same tensors, of which the values come later: on the current stream, or where the previous event is.

        Args:
            homes: memory for the first ones.
        """
        self._homes = [home for home in homes if home is not None]
        late = [
            home.tensor if home is not None else None if each is None else _without_numbers(each)
            for each, home in itertools.zip_longest(given, homes)
        ]
        if self._beside is None:
            for each, home in zip(given, homes, strict=False):
                if each is not None and home is not None:
                    home.write(each)
            return (*late[: len(homes)], *given[len(homes) :])
        for home in self._homes:
            _fill(home.tensor)
        current = torch.cuda.current_stream()
        self._beside.wait_stream(current)
        with torch.cuda.stream(self._beside if self.timing.previous_event == GIVEN else current):
            torch.cuda._sleep(LATE)
            for to, come_from in zip(late, given, strict=True):
                if to is not None and come_from is not None:
                    to.copy_(come_from)
                    come_from.record_stream(torch.cuda.current_stream())
        self._given = [each for each in late if each is not None]
        return tuple(late)

    def arguments(self) -> dict[str, Any]:
        """Of the call."""
        timing = self.timing
        return {
            "previous_event": self._recorded(timing.previous_event, 0),
            "previous_event_before_epilogue": self._recorded(timing.before_epilogue, LATER),
            "async_with_compute_stream": timing.asynchronous,
            "allocate_on_comm_stream": timing.on_comm_stream,
        }

    def _recorded(self, kind: str | None, clocks: int) -> EventHandle | EventOverlap | None:
        """An event beside the current stream, after everything that was queued there and so many clocks."""
        if kind != GIVEN:
            return None if kind is None else EventOverlap()
        if self._beside is None:
            return EventHandle()
        with torch.cuda.stream(self._beside):
            if clocks:
                torch.cuda._sleep(clocks)
            handle = EventHandle()
        if clocks:
            self._epilogue = handle
        return handle

    def began(self, event: EventOverlap) -> None:
        """The call has returned ``event``."""
        assert (event.event is not None) == self.timing.asynchronous, "an event exactly where nobody has waited"
        self._event = event
        shapes = [(each.shape, each.stride(), each.dtype) for each in self._given]
        self._given.clear()  # the call's caller must not hold them either
        if not self.timing.asynchronous:
            self._write_again()
        if self._on_gpu and self.timing.asynchronous:
            for shape, stride, dtype in shapes:
                _fill(torch.empty_strided(shape, stride, dtype=dtype, device="cuda"))

    def end(self) -> None:
        """Make the current stream wait, so that results may be looked at."""
        assert self._event is not None
        self._event.current_stream_wait(release_handle=True)
        self._write_again()
        if self._epilogue is not None and self._epilogue.event is not None:
            torch.cuda.current_stream().synchronize()
            assert self._epilogue.event.query(), "the call did not wait for previous_event_before_epilogue"

    def _write_again(self) -> None:
        """In the order of calls: simulated kernels may not have run yet."""
        for home in self._homes:
            home.write(_without_numbers(home.tensor))
        self._homes.clear()


@functools.cache
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _without_numbers(like: torch.Tensor) -> torch.Tensor:
    return _fill(torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device))


def _fill(tensor: torch.Tensor) -> torch.Tensor:
    """All bits set: no numbers, or no experts."""
    if tensor.dtype.itemsize == 1:
        tensor.view(torch.uint8).fill_(255)  # FP8 has no fill
        return tensor
    return tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
