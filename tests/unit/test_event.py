"""Events and the order of calls among streams, with streams that only write down what they are told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from deep_ep.event import CallOrder, EventHandle, EventOverlap, Kept, LastCall, looking


class Log:
    """What happened, in order: ("comm", "waits for", "compute") and the like."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.current = FakeStream("compute", self)


class FakeStream:
    device, priority = torch.device("cuda", 1), -1

    def __init__(self, name: str, log: Log) -> None:
        self.name, self.log = name, log

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FakeStream) and other.name == self.name

    __hash__ = None  # type: ignore[assignment]

    def wait_stream(self, other: FakeStream) -> None:
        self.log.lines.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: FakeEvent) -> None:
        self.log.lines.append(f"{self.name} waits for event on {event.stream}")


class FakeEvent:
    stream = "nothing"

    def record(self, stream: FakeStream) -> None:
        self.stream = stream.name


class FakeTensor:
    """A tensor that notes who keeps it alive."""

    def __init__(self, is_contiguous: bool = True) -> None:
        self.streams: list[str] = []
        self.is_contiguous = lambda: is_contiguous
        self.contiguous = FakeTensor

    def record_stream(self, stream: FakeStream) -> None:
        self.streams.append(stream.name)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()

    @contextlib.contextmanager
    def within(stream: FakeStream) -> Iterator[None]:
        log.lines.append(f"enter {stream.name}")
        yield

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def current_stream(device: torch.device | None = FakeStream.device) -> FakeStream:
        assert device == FakeStream.device, "the current device is another than the buffer's"
        return log.current

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", within)
    return log


def order_of(log: Log, *, previous: Any = None, asynchronous: bool = False, keep: bool = False) -> CallOrder:
    comm: Any = FakeStream("comm", log)
    return CallOrder(comm, previous, asynchronous, keep)


# Without a GPU


def test_inert_without_a_gpu() -> None:
    event = EventHandle.inert()
    assert event.event is None
    event.current_stream_wait()
    EventOverlap().current_stream_wait()
    order = CallOrder(None, EventOverlap(), asynchronous=True, keep_in_event=False)
    order.begin(LastCall(), 0)
    order.wait_for(EventOverlap(event))
    with order.allocation(True):
        pass
    assert order.stream is None
    assert order.end([torch.zeros(1), None], []).event is not None, "an asynchronous call always leaves an event"


def test_a_synchronous_call_leaves_no_event() -> None:
    """SGLang tests ``event.event is None``."""
    assert CallOrder(None, None, asynchronous=False, keep_in_event=False).end([], []).event is None


def test_hooks_run_once_after_the_wait() -> None:
    calls: list[str] = []
    overlap = EventOverlap(EventHandle.inert())
    overlap.register_hook_after_wait(lambda: calls.append("first"))
    overlap.register_hook_after_wait(lambda: calls.append("second"))
    assert calls == []
    overlap.current_stream_wait()
    overlap.current_stream_wait()
    assert calls == ["first", "second"]


def test_context_manager_waits_on_exit(log: Log) -> None:
    with EventOverlap(EventHandle()) as overlap:
        assert log.lines == []
        assert isinstance(overlap, EventOverlap)
    assert log.lines == ["compute waits for event on compute"]


def test_call_waits_and_may_release(log: Log) -> None:
    tensors = [torch.zeros(1)]
    overlap = EventOverlap(EventHandle(), tensors)
    overlap()
    assert overlap.event is not None
    assert overlap.extra_tensors is tensors
    overlap(release_handle=True)
    assert overlap.event is None
    assert overlap.extra_tensors is None
    assert log.lines == ["compute waits for event on compute"] * 2


# The order of a call


def test_plain_call_runs_on_the_current_stream(log: Log) -> None:
    order = order_of(log)
    order.begin(LastCall(), 0)
    assert order.stream is not None
    assert order.stream.name == "compute"  # type: ignore[attr-defined]
    assert order.end([], []).event is None
    assert log.lines == [], "no hand-over"


def test_asynchronous_call_leaves_the_current_stream_alone(log: Log) -> None:
    order = order_of(log, asynchronous=True)
    order.begin(LastCall(), 0)
    assert log.lines == ["comm waits for event on compute"]
    event = order.end([], [])
    assert log.lines == ["comm waits for event on compute"]
    event.current_stream_wait()
    assert log.lines[1:] == ["compute waits for event on comm"]


def test_previous_event_stands_for_the_current_stream(log: Log) -> None:
    order = order_of(log, previous=EventHandle())
    order.begin(LastCall(), 0)
    assert log.lines == ["comm waits for event on compute"]
    order.end([], [])
    assert log.lines[1:] == ["compute waits for event on comm"]


def test_previous_event_that_is_empty(log: Log) -> None:
    """A synchronous call's EventOverlap holds no event: its results are ordered on the current stream."""
    order = order_of(log, previous=EventOverlap())
    order.begin(LastCall(), 0)
    assert order.stream is not None
    assert order.stream.name == "compute"  # type: ignore[attr-defined]
    order_of(log, previous=EventOverlap(), asynchronous=True).begin(LastCall(), 0)
    assert log.lines == ["comm waits for event on compute"]


def call(log: Log, last: LastCall, capture: int = 0, **timing: Any) -> list[str]:
    """A call from begin to end on the current stream; returns what was waited for."""
    log.lines.clear()
    order = order_of(log, **timing)
    order.begin(last, capture)
    waits = list(log.lines)
    order.end([], [])
    return waits


def test_one_call_after_the_other(log: Log) -> None:
    """Two calls of a buffer never overlap, whatever their streams."""
    last = LastCall()
    log.current = FakeStream("elsewhere", log)
    assert call(log, last) == []
    log.current = FakeStream("compute", log)
    assert call(log, last) == ["compute waits for event on elsewhere"]


def test_the_same_stream_is_in_order_by_itself(log: Log) -> None:
    last = LastCall()
    for _ in range(2):
        assert call(log, last) == []
    for _ in range(2):
        assert call(log, last, asynchronous=True)[-1] == "comm waits for event on compute"


def test_what_was_queued_behind_the_last_call_is_not_waited_for(log: Log) -> None:
    """It ran on the compute stream, on which something long may have been queued since."""
    last = LastCall()
    for before in ({}, {"asynchronous": True}, {"previous": EventHandle()}):
        call(log, last, **before)
        for now in ({"previous": EventHandle()}, {"previous": EventHandle(), "asynchronous": True}):
            waits = call(log, last, **now)
            assert waits
            assert all(wait == "comm waits for event on compute" for wait in waits)


def test_a_call_that_ended_before_its_launch_is_not_the_last(log: Log) -> None:
    last = LastCall()
    call(log, last)
    order_of(log, asynchronous=True).begin(last, 0)
    log.current = FakeStream("elsewhere", log)
    assert call(log, last) == ["elsewhere waits for event on compute"]


def test_an_event_that_was_handed_out_is_not_recorded_again(log: Log) -> None:
    last = LastCall()
    order = order_of(log, asynchronous=True)
    order.begin(last, 0)
    handed = order.end([], []).event
    assert handed is not None
    assert isinstance(handed.event, FakeEvent)
    log.current = FakeStream("elsewhere", log)
    call(log, last)
    assert handed.event.stream == "comm"


def test_order_inside_and_outside_of_captures(log: Log) -> None:
    """Calls of one capture wait for each other, never for one outside, nor one outside for them."""

    def call_on(name: str, capture: int) -> list[str]:
        log.current = streams[name]
        return call(log, last, capture)

    last = LastCall()
    streams = {name: FakeStream(name, log) for name in "abc"}
    assert call_on("a", 0) == []
    assert call_on("b", 7) == [], "the call before ran outside"
    assert call_on("c", 7) == ["c waits for event on b"]
    assert call_on("b", 0) == ["b waits for event on a"], "the last call that ran, not the one that was captured"
    assert call_on("b", 7) == ["b waits for event on c"]
    assert call_on("a", 8) == [], "another capture"


def test_after_an_error_the_current_stream_waits_for_what_was_launched(log: Log) -> None:
    """Its pool has the memory of tensors that kernels may still use."""
    for arguments, waits in (({}, []), ({"asynchronous": True}, ["compute waits for comm"])):
        order = order_of(log, **arguments)
        log.lines.clear()
        order.abandon()
        assert log.lines == waits
    CallOrder(None, None, True, False).abandon()


def test_where_outputs_are_allocated(log: Log) -> None:
    for asynchronous, on_comm in ((False, False), (False, True), (True, False)):
        with order_of(log, asynchronous=asynchronous).allocation(on_comm):
            pass
    assert log.lines == []
    with order_of(log, asynchronous=True).allocation(True):
        assert log.lines == ["enter comm"]


def test_outputs_do_not_come_from_a_pool_that_the_kernels_do_not_wait_for(log: Log) -> None:
    with order_of(log, previous=EventHandle()).allocation(False):
        assert log.lines == ["enter comm"]


def test_copies_come_after_what_the_kernels_wait_for(log: Log) -> None:
    with order_of(log).running():
        assert log.lines == []
    with order_of(log, asynchronous=True).running():
        assert log.lines == ["enter comm"]


def test_arguments_are_looked_at_after_what_the_kernels_wait_for(log: Log) -> None:
    """The validating mode reads topk_idx, which may come from another stream than the current one."""
    comm: Any = FakeStream("comm", log)
    for previous in (None, EventOverlap()):
        with looking(comm, previous):
            assert log.lines == []
    with looking(comm, EventHandle()):
        assert log.lines == ["comm waits for event on compute", "enter comm"]
    with looking(None, EventOverlap(EventHandle.inert())):
        assert len(log.lines) == 2


def test_tensors_live_until_both_streams_have_used_them(log: Log) -> None:
    read: Any = FakeTensor()
    written: Any = FakeTensor()
    event = order_of(log, asynchronous=True).end([read, None], [written])
    assert read.streams == ["comm"]
    assert written.streams == ["compute", "comm"]
    assert event.extra_tensors is None

    read, written = FakeTensor(), FakeTensor()
    event = order_of(log, asynchronous=True, keep=True).end([read], [written, None])
    assert read.streams == []
    assert written.streams == ["compute"], "the user's stream may use it longer than the event lives"
    assert event.extra_tensors == [read, written]

    written = FakeTensor()
    order_of(log, previous=EventHandle()).end([], [written])
    assert written.streams == ["compute"]


def test_outputs_of_the_current_stream_need_no_word_about_it(log: Log) -> None:
    written: Any = FakeTensor()
    order = order_of(log, asynchronous=True)
    with order.allocation(False):
        pass
    order.end([], [written])
    assert written.streams == ["comm"]

    written = FakeTensor()
    order = order_of(log, asynchronous=True)
    with order.allocation(True):
        pass
    order.end([], [written])
    assert written.streams == ["compute", "comm"]


def test_copies_are_made_where_they_are_needed_and_live_as_long(log: Log) -> None:
    given: Any = FakeTensor()
    strided: Any = FakeTensor(is_contiguous=False)
    order = order_of(log, asynchronous=True)
    assert order.contiguous(given) is given
    assert order.contiguous(None) is None
    assert log.lines == []
    copy: Any = order.contiguous(strided)
    assert log.lines == ["enter comm"]
    with order.allocation(False):
        pass
    order.end([strided], [])
    assert copy.streams == ["compute", "comm"]
    assert strided.streams == ["comm"]


def test_streams_are_told_once_of_what_a_handle_keeps(log: Log) -> None:
    tensor: Any = FakeTensor()
    kept, comm, other = Kept([tensor]), FakeStream("comm", log), FakeStream("other", log)

    def call_on(stream: Any, capture: int = 0, **how: Any) -> EventOverlap:
        tensor.streams.clear()
        order = CallOrder(stream, how.get("previous"), how.get("asynchronous", True), how.get("keep", False))
        order.begin(LastCall(), capture)
        return order.end([], [], kept)

    call_on(comm, asynchronous=False, previous=EventHandle())
    assert tensor.streams == [], "the current stream waits for the call, and so does whoever gets the memory next"
    assert call_on(comm, keep=True).extra_tensors == [tensor]
    call_on(comm, capture=1)
    assert tensor.streams == ["comm"]
    call_on(comm)
    assert tensor.streams == ["comm"], "what was told in a capture does not count"
    call_on(comm)
    assert tensor.streams == []
    assert call_on(comm, keep=True).extra_tensors == [tensor]
    call_on(comm, capture=1)
    assert tensor.streams == ["comm"]
    call_on(other)
    assert tensor.streams == ["other"], "another buffer's"


@pytest.mark.parametrize(("keep", "capture"), [(False, 0), (False, 1), (True, 0)])
def test_outputs_that_are_kept(log: Log, keep: bool, capture: int) -> None:
    """A handle knows whether the allocator was told."""
    order = order_of(log, asynchronous=True, keep=keep)
    order.begin(LastCall(), capture)
    tensor: Any = FakeTensor()
    order.end([], [tensor])
    assert order.keep([tensor]).stream is (None if keep or capture else order.stream)
