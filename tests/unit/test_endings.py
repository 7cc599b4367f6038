"""How a buffer ends, on a machine that launches nothing: who frees its memory, when, and what a failure there hides."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from deep_ep import ElasticBuffer
from deep_ep.calls import dropped, endpoint
from deep_ep.errors import EPError
from tests.unit.fake_machine import FakeMachine, build, dispatch


@pytest.fixture(autouse=True)
def parked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dropped.Dropped]]:
    """What is parked in this test alone."""
    gc.collect()
    own: list[dropped.Dropped] = []
    monkeypatch.setattr(dropped, "PARKED", own)
    yield own
    gc.collect()


class Holder(torch.nn.Module):
    def __init__(self, buffer: ElasticBuffer) -> None:
        super().__init__()
        self.buffer = buffer


def drop(machine: FakeMachine) -> None:
    buffer = build()
    assert not machine.window.closed
    del buffer
    gc.collect()


# Dropped


def test_garbage_collection_frees_nothing_while_kernels_may_run(machine: FakeMachine) -> None:
    """On any thread, at any moment: perhaps while another thread captures a CUDA graph."""
    drop(machine)
    assert (machine.num_meetings, machine.num_closed, machine.window.closed) == (0, 0, False)


def test_a_dropped_buffer_is_freed_at_once_where_kernels_have_ended(machine: FakeMachine) -> None:
    machine.launches_finish = True
    drop(machine)
    assert (machine.num_meetings, machine.num_closed, machine.window.closed) == (0, 1, True)


NEXT: dict[str, Callable[[ElasticBuffer], Any]] = {
    "dispatch": lambda buffer: dispatch(buffer, do_cpu_sync=False),
    "barrier": ElasticBuffer.barrier,
    "get_comm_stream": ElasticBuffer.get_comm_stream,
    "build": lambda _: build(),
    "destroy": ElasticBuffer.destroy,
    "the end": lambda _: dropped.free_parked(),
}


@pytest.mark.parametrize("call", NEXT)
def test_the_next_call_frees_what_was_dropped(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    buffer, other = build(), FakeMachine()
    with monkeypatch.context() as patch:
        patch.setattr(endpoint, "open_machine", lambda *_: other)
        drop(other)
    assert other.steps == []
    result = NEXT[call](buffer)
    assert (other.steps, other.closed_together, other.window.closed) == (["close"], False, True)
    del result


def test_nothing_is_freed_while_a_graph_is_captured(machine: FakeMachine, parked: list[dropped.Dropped]) -> None:
    buffer, other = build(), build()
    del other
    gc.collect()
    machine.capture = 1
    dispatch(buffer, do_cpu_sync=False)
    assert (machine.num_closed, len(parked)) == (0, 1)
    machine.capture = 0
    dispatch(buffer, do_cpu_sync=False)
    assert (machine.num_closed, len(parked)) == (1, 0)


# Destroyed


def test_what_a_failure_leaves_out(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each step is tried, and none hides the error that the caller has already."""

    def fail(what: str) -> Callable[..., Any]:
        def raise_it(*_: Any, **__: Any) -> None:
            failed.append(what)
            raise RuntimeError(f"{what} failed")

        return raise_it

    def clean_up() -> None:
        try:
            raise ZeroDivisionError
        finally:
            buffer.destroy()

    failed: list[str] = []
    buffer = build()
    monkeypatch.setattr(machine, "comm_stream", object())
    monkeypatch.setattr(machine, "current_capture", fail("current_capture"))
    monkeypatch.setattr(torch.cuda, "synchronize", fail("synchronize"))
    monkeypatch.setattr(machine, "all_gather_object", fail("all_gather_object"))
    monkeypatch.setattr(machine, "close", fail("close"))
    with caplog.at_level(logging.WARNING, "deep_ep"), pytest.raises(ZeroDivisionError) as caught:
        clean_up()
    assert caught.value.__context__ is None
    assert failed == ["current_capture", "synchronize", "all_gather_object", "close"]
    assert len(caplog.records) == len(failed)
    for what, record in zip(failed, caplog.records, strict=True):
        assert f"{what} failed" in record.getMessage()
    buffer.destroy()
    assert len(failed) == 4


def test_a_device_that_has_failed_lets_peers_wait_briefly(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And what a kernel had recorded before is told."""

    def fail(device: torch.device) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    buffer = build()
    monkeypatch.setattr(machine, "comm_stream", object())
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    machine.leave_fault()
    buffer.destroy()
    assert "nobody was told: rank 0 waited 2.0 s in collect: for rank 1" in caplog.text
    assert machine.meeting_limit_s == endpoint.BROKEN_SECONDS
    assert (machine.steps, machine.closed_together) == (["meet", "close"], False)


def test_ctrl_c_gets_through_and_memory_is_given_back(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    buffer = build()
    monkeypatch.setattr(machine, "all_gather_object", interrupt)
    with pytest.raises(KeyboardInterrupt):
        buffer.destroy()
    assert (machine.steps, machine.closed_together) == (["close"], False)


def test_ranks_end_together_only_if_all_is_well_on_all(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    build().destroy()
    assert machine.closed_together
    broken = build()
    machine.on_launch = machine.leave_fault
    dispatch(broken, do_cpu_sync=False)
    broken.destroy()
    assert machine.closed_together is False
    machine.on_launch = lambda: None
    peers_are_broken = build()
    monkeypatch.setattr(machine, "all_gather_object", lambda value, what, limit_s: [value, False])
    peers_are_broken.destroy()
    assert machine.closed_together is False


# Not built


def test_ctrl_c_while_it_is_built_leaves_nothing(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(machine, "allocate_window", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build()
    assert machine.steps == ["close"]


def test_what_fails_behind_the_last_step_leaves_nothing_either(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(endpoint.Window, "of", fail)
    with pytest.raises(MemoryError):
        build()
    assert machine.steps == ["close"]
    assert machine.window.closed


def test_closing_hides_no_error(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("closing failed")

    machine.prepare_fails = True
    monkeypatch.setattr(machine, "close", fail)
    with pytest.raises(EPError, match="does not compile"):
        build()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_there_are_no_copies_of_a_buffer(machine: FakeMachine, duplicate: Callable[[Any], Any]) -> None:
    """A half of one would end the other's memory when it goes."""
    buffer = build()
    for holder in (buffer, [buffer], Holder(buffer)):
        with pytest.raises(TypeError, match=r"cannot be copied or pickled: .* share the one, or build another"):
            copy.deepcopy(holder) if duplicate is copy.copy and holder is not buffer else duplicate(holder)
    gc.collect()
    assert (machine.num_closed, machine.window.closed) == (0, False)
    dispatch(buffer, do_cpu_sync=False)


# In a forked child


@pytest.mark.parametrize("launches_finish", [True, False], ids=["simulated", "cuda"])
def test_a_forked_child_frees_nothing(machine: FakeMachine, launches_finish: bool) -> None:
    """Neither what it has a copy of, nor what the parent has parked; and it cannot call."""
    machine.launches_finish = launches_finish
    buffer, other = build(), build()
    if not launches_finish:
        del other
        gc.collect()
    child = os.fork()
    if child == 0:
        problem = 1
        with contextlib.suppress(BaseException):
            with pytest.raises(ValueError, match="of which this one is a fork: it cannot be used here"):
                dispatch(buffer)
            buffer.destroy()
            del buffer
            gc.collect()
            dropped.free_parked()
            problem = machine.num_closed + machine.num_meetings + int(machine.window.closed)
        os._exit(problem)
    assert os.waitpid(child, 0)[1] == 0
    dispatch(buffer, do_cpu_sync=False)
