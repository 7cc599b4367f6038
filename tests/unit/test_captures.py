"""Calls inside a CUDA graph capture, on a machine that only says that there is one: nothing may wait there."""

from __future__ import annotations

import logging

import pytest

from deep_ep import ElasticBuffer
from deep_ep.calls import dispatch as calls_dispatch
from deep_ep.errors import EPError
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
