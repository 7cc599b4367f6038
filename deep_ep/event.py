"""Streams and events: what a call waits for, and what may wait for it. On simulated ranks all of it is inert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch

NOTHING = nullcontext()  # for all who enter no context
Tensor = TypeVar("Tensor", torch.Tensor, torch.Tensor | None)


class EventHandle:
    """A CUDA event, recorded on the current stream when it is made (nothing where there is no GPU)."""

    def __init__(self) -> None:
        self.event: torch.cuda.Event | None = None
        self._device: torch.device | None = None
        if torch.cuda.is_available():
            self._record(torch.cuda.current_stream())

    @classmethod
    def inert(cls) -> EventHandle:
        """An event that has happened."""
        handle = cls.__new__(cls)
        handle.event = handle._device = None
        return handle

    @classmethod
    def on(cls, stream: torch.cuda.Stream) -> EventHandle:
        """An event recorded on ``stream`` now."""
        handle = cls.inert()
        handle._record(stream)
        return handle

    def _record(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.event.record(stream)
        self._device = stream.device

    def current_stream_wait(self) -> None:
        """Make the current stream of the event's device wait for it. Does not block the host."""
        if self.event is not None:
            torch.cuda.current_stream(self._device).wait_event(self.event)


class EventOverlap:
    """What an asynchronous call gives back: an event to wait for, and the tensors that must live until then.

    ``event`` is None when the call left nothing to wait for. As a context manager it waits on exit; called with
    ``release_handle`` it waits at once.
    """

    def __init__(self, event: EventHandle | None = None, extra_tensors: Sequence[torch.Tensor] | None = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors
        self._hooks: list[Callable[[], Any]] = []

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Make the current stream wait; then run the hooks.

        Args:
            release_handle: forget event and tensors afterwards.
        """
        if self.event is not None:
            self.event.current_stream_wait()
        if release_handle:
            self.event = None
            self.extra_tensors = None
        hooks, self._hooks = self._hooks, []
        for hook in hooks:
            hook()

    def register_hook_after_wait(self, fn: Callable[[], Any]) -> None:
        """Call ``fn`` once, after the next wait."""
        self._hooks.append(fn)

    def __call__(self, release_handle: bool = False) -> None:
        self.current_stream_wait(release_handle)

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.current_stream_wait()


class Timing(NamedTuple):
    """What a call waits for and who waits for it, as its caller said."""

    previous_event: EventOverlap | EventHandle | None
    """What kernels wait for, instead of for what is queued on the current stream."""
    previous_event_before_epilogue: EventOverlap | EventHandle | None
    """What is waited for before output tensors are written."""
    asynchronous: bool
    """The current stream does not wait for the call."""
    allocate_on_comm_stream: bool


@dataclass
class CallEnd:
    """Where a call's last launch stands: its stream, and an event behind it; both None before the first call."""

    capture: int
    stream: torch.cuda.Stream | None = None
    event: torch.cuda.Event | None = None
    # Recorded again and again: a wait is for what was recorded when it was asked.
    _own: torch.cuda.Event | None = None
    _handed: torch.cuda.Event | None = None

    def note(self, stream: torch.cuda.Stream, event: torch.cuda.Event | None = None) -> torch.cuda.Event:
        """A call ends here; ``event`` is what it has recorded there itself. Returns the event."""
        if event is None:
            if self._own is None:
                self._own = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._own.record(stream)
            event = self._own
        self.stream, self.event = stream, event
        return event

    def hand_over(self, source: torch.cuda.Stream, target: torch.cuda.Stream) -> None:
        """The next call, on ``target``, waits for what ``source`` was given so far. As Stream.wait_stream does, which
        makes an event each time."""
        if self._handed is None:
            self._handed = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._handed.record(source)
        target.wait_event(self._handed)


class LastCall:
    """The end of a buffer's call before, so that no two of its calls overlap, whatever their streams.

    An event stands for it, not its stream: what was queued there since is none of the next call's business.

    Calls inside a CUDA graph capture do not run yet. They are ordered among themselves, by events inside the capture:
    an event of a capture must not be waited for outside of it, nor one from outside inside. What orders replays of the
    graph with other calls is the stream that it is replayed on, and that is the caller's to see to (docs/guide.md).
    """

    def __init__(self) -> None:
        self._ran, self._captured = CallEnd(0), CallEnd(0)

    def of(self, capture: int) -> CallEnd:
        """The last one in the capture of that number (0: in none), where the next call is noted too."""
        if capture == 0:
            return self._ran
        if self._captured.capture != capture:
            self._captured = CallEnd(capture)
        return self._captured


class Kept:
    """Tensors that a handle keeps, for calls to read.

    torch's allocator remembers which streams use a tensor until it has its memory back, so it is told once.
    """

    __slots__ = ("stream", "tensors")

    def __init__(self, tensors: Sequence[torch.Tensor], stream: torch.cuda.Stream | None = None) -> None:
        self.tensors = tensors
        self.stream = stream
        """The one that the allocator was told of last."""


class CallOrder:
    """One call's place among the streams: begin() before its first launch, end() after its last.

    A call that is to run beside the compute stream takes the communication stream. Any other runs on the current stream
    itself: two hand-overs less.

    Args:
        comm_stream: the machine's, or None on simulated ranks (then nothing here does anything).
        previous_event: what the kernels wait for, instead of for what is queued on the current stream.
        asynchronous: the current stream shall not wait for the call.
        keep_in_event: keep tensors alive inside the returned event rather than by record_stream.
    """

    def __init__(
        self,
        comm_stream: torch.cuda.Stream | None,
        previous_event: EventOverlap | EventHandle | None,
        asynchronous: bool,
        keep_in_event: bool,
    ) -> None:
        self._previous = _recorded(previous_event)
        self._asynchronous = asynchronous
        self._keep_in_event = keep_in_event
        # Of the buffer's device, whichever is the thread's current one.
        self._current = torch.cuda.current_stream(comm_stream.device) if comm_stream is not None else None
        self._beside = asynchronous or self._previous is not None
        self.stream = comm_stream if self._beside else self._current
        """Where the call's kernels run; None on simulated ranks."""
        self._last = CallEnd(0)
        self._capture = 0
        self._told: torch.cuda.Stream | None = None  # that it uses the tensors of end()
        self._copies: list[torch.Tensor] = []
        self._outputs_are_currents = False  # known to come from the current stream's pool

    def begin(self, last_call: LastCall, capture: int) -> None:
        """Make the stream wait for the inputs, and for the buffer's call before this one.

        Args:
            last_call: of the buffer; end() lets this call take its place.
            capture: the number of the CUDA graph capture that the current stream takes part in, or 0.
        """
        if self.stream is None or self._current is None:
            return
        self._capture = capture
        self._last = last = last_call.of(capture)
        if last.event is not None and last.stream is not self.stream and last.stream != self.stream:
            self.stream.wait_event(last.event)
        if self._previous is not None:
            self.stream.wait_event(self._previous)
        elif self._beside:
            last.hand_over(self._current, self.stream)

    def wait_for(self, event: EventOverlap | EventHandle | None) -> None:
        """Make the stream wait for an event of an earlier call."""
        recorded = _recorded(event)
        if self.stream is not None and recorded is not None:
            self.stream.wait_event(recorded)

    def running(self) -> AbstractContextManager[Any]:
        """The context of copies that the kernels read: they come after what the kernels wait for, and before them."""
        return torch.cuda.stream(self.stream) if self._beside and self.stream else NOTHING

    def contiguous(self, tensor: Tensor) -> Tensor:
        """The tensor for kernels to read: itself if it is contiguous or None, else a copy."""
        if tensor is None or tensor.is_contiguous():
            return tensor
        with self.running():
            copy = tensor.contiguous()
        self._copies.append(copy)
        return copy

    def allocation(self, on_comm_stream: bool) -> AbstractContextManager[Any]:
        """The context in which outputs are allocated.

        Kernels that do not wait for the current stream must not write into memory that its pool hands out: work queued
        there may still use it. So a previous event has outputs come from the communication stream's pool in any case.
        """
        if on_comm_stream or self._previous is not None:
            return self.running()
        self._outputs_are_currents = True
        return NOTHING

    def end(
        self,
        inputs: Sequence[torch.Tensor | None],
        outputs: Sequence[torch.Tensor | None],
        kept: Kept | None = None,
    ) -> EventOverlap:
        """Make the current stream wait, or, when asynchronous, hand out an event that can be waited for.

        Args:
            inputs: what the kernels read, beside copies.
            outputs: what they write: wherever it was allocated, both streams use it.
            kept: what they read of a handle.
        """
        if self.stream is None or self._current is None:
            return EventOverlap(EventHandle.inert() if self._asynchronous else None)
        if not self._beside:
            self._last.note(self.stream)
            return EventOverlap()
        written = [tensor for tensor in outputs if tensor is not None]
        # Also with keep_in_event. Outputs outlive the event, and those of the communication stream's pool go back there
        # as soon as nobody holds them, for a call that need not wait for the current stream's reads of them
        # (previous_event). To outputs of the current stream's own pool this would do nothing.
        for tensor in self._copies if self._outputs_are_currents else (*self._copies, *written):
            tensor.record_stream(self._current)
        if not self._asynchronous:
            self._current.wait_event(self._last.note(self.stream))
            return EventOverlap()
        living = [*(tensor for tensor in inputs if tensor is not None), *self._copies, *written]
        if kept is not None and (self._keep_in_event or self._capture or kept.stream is not self.stream):
            living += kept.tensors
        event = EventHandle.on(self.stream)
        self._last.note(self.stream, event.event)
        if self._keep_in_event:
            return EventOverlap(event, living)
        for tensor in living:
            tensor.record_stream(self.stream)
        if not self._capture:  # of what is told there, the allocator forgets some when the capture ends
            self._told = self.stream
            if kept is not None:
                kept.stream = self.stream
        return EventOverlap(event)

    def abandon(self) -> None:
        """Instead of end(), after an error: what was launched may still run, with tensors that nobody holds any more.
        So whatever gets their memory waits for it."""
        if self._beside and self._current is not None and self.stream is not None:
            self._current.wait_stream(self.stream)

    def keep(self, outputs: Sequence[torch.Tensor]) -> Kept:
        """Outputs that end() has seen, for later calls to read."""
        return Kept(outputs, self._told)


def looking(
    comm_stream: torch.cuda.Stream | None, previous_event: EventOverlap | EventHandle | None
) -> AbstractContextManager[Any]:
    """The context in which a call's arguments can be looked at: after what its kernels will wait for."""
    recorded = _recorded(previous_event)
    if comm_stream is None or recorded is None:
        return nullcontext()
    comm_stream.wait_event(recorded)
    return torch.cuda.stream(comm_stream)


def is_recorded(event: EventOverlap | EventHandle | None) -> bool:
    """Whether there is anything to wait for."""
    return _recorded(event) is not None


def _recorded(event: EventOverlap | EventHandle | None) -> torch.cuda.Event | None:
    """The CUDA event inside; None where there is none, as in what a synchronous call returns."""
    handle = event.event if isinstance(event, EventOverlap) else event
    return None if handle is None else handle.event
