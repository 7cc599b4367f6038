"""Calls inside a CUDA graph capture, on a machine that only says that there is one: nothing may wait there."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import pytest

from deep_ep import ElasticBuffer
from deep_ep.calls import dispatch as calls_dispatch
from deep_ep.calls import endpoint
from deep_ep.errors import EPError
from deep_ep.event import EventHandle
from tests.unit.fake_machine import FakeMachine, build, dispatch


def test_a_buffer_is_not_destroyed_there(buffer: ElasticBuffer, machine: FakeMachine) -> None:
    machine.capture = 1
    with pytest.raises(EPError, match="a deep_ep buffer cannot be destroyed inside a CUDA graph capture"):
        buffer.destroy()
    dispatch(buffer, do_cpu_sync=False)
    machine.capture = 0
    buffer.destroy()
    assert machine.window.closed


def test_the_validating_mode_looks_only_outside(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Looking waits for the device; whoever debugs a program with graphs is told what is not looked at."""
    monkeypatch.setenv("EP_BUFFER_DEBUG", "1")
    buffer, looks = build(), list[int]()
    monkeypatch.setattr(calls_dispatch.validate, "are_valid_selections", lambda _, experts: looks.append(experts))
    for machine.capture in (0, 1, 0):
        dispatch(buffer, do_cpu_sync=False)
    assert len(looks) == 2
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["rank 0: EP_BUFFER_DEBUG does not look at topk_idx inside a CUDA graph capture"]


def test_the_validating_mode_looks_after_what_the_kernels_wait_for(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """topk_idx may not be there before."""

    @contextlib.contextmanager
    def looking(comm_stream: object, previous_event: object) -> Iterator[None]:
        log.append(f"after {previous_event}")
        yield
        log.append("done")

    log: list[str] = []
    monkeypatch.setenv("EP_BUFFER_DEBUG", "1")
    monkeypatch.setattr(endpoint, "looking", looking)
    monkeypatch.setattr(calls_dispatch.validate, "are_valid_selections", lambda *_: log.append("look"))
    event = EventHandle.inert()
    dispatch(build(), do_cpu_sync=False, previous_event=event)
    assert log == [f"after {event}", "look", "done"]
