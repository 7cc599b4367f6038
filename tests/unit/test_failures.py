"""What goes wrong in a call, on a machine that launches nothing: who is told, when, and what becomes of the buffer."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import deep_ep
from deep_ep import ElasticBuffer
from deep_ep.calls import dispatch as calls_dispatch
from deep_ep.calls import dropped, endpoint
from deep_ep.calls.agreement import Settings
from deep_ep.calls.host_counts import HostCounts
from deep_ep.errors import EPEnvironmentError, EPError, EPTimeoutError
from deep_ep.event import CallOrder
from tests.unit.fake_machine import HIDDEN, FakeMachine, build, dispatch, others_differ


def test_a_buffer_that_cannot_be_built_leaves_nothing(machine: FakeMachine) -> None:
    machine.prepare_fails = True
    with pytest.raises(EPError, match="does not compile"):
        build()
    assert machine.num_closed == 1
    assert not hasattr(machine, "window")


def test_what_fails_on_one_rank_is_told_to_all_before_they_wait_for_it(machine: FakeMachine) -> None:
    machine.answers = [None, "EPCompileError: combine did not compile"]
    with pytest.raises(EPError, match="rank 1 of the group cannot take part: EPCompileError: combine did not compile"):
        build()
    assert machine.num_closed == 1
    assert not hasattr(machine, "window")


def test_another_version_on_another_rank(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    for what, own in (("package", re.escape(deep_ep.__version__)), ("headers", r"\w{12}"), ("layout", r"\w{12}")):
        with monkeypatch.context() as patch:
            others_differ(machine, patch, **{what: "0123456789ab"})
            complaint = f"different versions of deep_ep: rank 0 has {what} {own}, rank 1 0123456789ab;"
            with pytest.raises(EPError, match=complaint):
                build()
    assert machine.num_closed == 3


def test_indices_of_another_width_than_at_import(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EP_NUM_TOPK_IDX_BITS", "32" if deep_ep.topk_idx_t == torch.int64 else "64")
    with pytest.raises(EPEnvironmentError, match="when deep_ep was imported"):
        build()
    assert machine.prepared == []


@pytest.mark.parametrize(
    ("name", "mine", "theirs"),
    [("num_bytes", 4 << 20, 6 << 20), ("num_max_tokens_per_rank", 8, 9), ("allow_multiple_reduction", True, False)],
)
def test_other_settings_on_another_rank(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, name: str, mine: Any, theirs: Any
) -> None:
    settings = replace(Settings(4 << 20, 8, allow_multiple_reduction=True), **{name: theirs})
    others_differ(machine, monkeypatch, settings=settings)
    with pytest.raises(
        ValueError, match=f"^{name} must be the same on all ranks, but it is {mine} on rank 0 and {theirs} on rank 1 of"
    ):
        build(num_bytes=4 << 20)
    assert machine.num_closed == 1
    assert not hasattr(machine, "window")


def test_counts_that_never_come(buffer: ElasticBuffer, machine: FakeMachine) -> None:
    impatient = build(num_cpu_timeout_secs=0.01)
    with pytest.raises(EPTimeoutError, match=r"rank 0 waited 0.01 s for the counts .* num_cpu_timeout_secs") as caught:
        dispatch(impatient)
    assert caught.value.report is not None
    assert (caught.value.report.rank, caught.value.report.phase) == (0, "for the counts of a dispatch")
    with pytest.raises(EPError, match="this buffer must be rebuilt on every rank: the host waited in vain for the cou"):
        dispatch(impatient)


def test_counts_that_never_come_name_who_does_not_send_them(machine: FakeMachine) -> None:
    """Where the host's limit is the shorter one: kernels have given notice by then, of whom they wait for."""
    impatient = build(num_cpu_timeout_secs=0.05, num_gpu_timeout_secs=100)
    patience = impatient._endpoint.patience_argument
    assert patience.notice_ns < 0.05e9 < patience.timeout_ns
    machine.on_launch = lambda: machine.leave_fault(record=1)
    told = "rank 0 waited 0.05 s for the counts of a dispatch, while its kernels waited for rank 1; every rank"
    with pytest.raises(EPTimeoutError, match=told) as caught:
        dispatch(impatient)
    assert caught.value.report is not None
    assert caught.value.report.peers == (1,)


def test_who_waits_long_says_so(machine: FakeMachine, caplog: pytest.LogCaptureFixture) -> None:
    """The host of itself, and kernels through a record, once each; both before they give up."""
    impatient = build(num_cpu_timeout_secs=0.2, num_gpu_timeout_secs=8)
    machine.on_launch = lambda: machine.leave_fault(record=1)
    with caplog.at_level(logging.WARNING, "deep_ep"), pytest.raises(EPTimeoutError):
        dispatch(impatient)
    kernel, host = (record.getMessage() for record in caplog.records[:2])
    assert kernel.startswith("rank 0 has waited 2.0 s in collect: for rank 1 "), kernel
    assert kernel.endswith("it gives up after 8.0 s")
    assert host == "rank 0 has waited 0.1 s for the counts of a dispatch; it gives up after 0.2 s"
    assert len(caplog.records) <= 4, "it says so ever less often"


def test_a_broken_buffer_does_not_wait_long_to_be_destroyed(machine: FakeMachine) -> None:
    buffer = build()
    machine.on_launch = machine.leave_fault
    dispatch(buffer, do_cpu_sync=False)
    buffer.destroy()
    assert machine.meeting_limit_s == endpoint.BROKEN_SECONDS
    build().destroy()
    assert machine.meeting_limit_s is None


def test_nor_does_one_that_is_destroyed_while_an_error_is_on_its_way(machine: FakeMachine) -> None:
    """Peers may be in a call that this rank will not make."""

    def work() -> None:
        buffer = build()
        try:
            raise ArithmeticError("of the user's own")
        finally:
            buffer.destroy()

    with pytest.raises(ArithmeticError, match="of the user's own"):
        work()
    assert machine.meeting_limit_s == endpoint.BROKEN_SECONDS
    build().destroy()
    assert machine.meeting_limit_s is None


@pytest.mark.parametrize("do_cpu_sync", [False, True])
def test_a_fault_breaks_the_buffer(buffer: ElasticBuffer, machine: FakeMachine, do_cpu_sync: bool) -> None:
    """Told at once where the host waits, else by the next call; and no later call is let through."""
    machine.on_launch = machine.leave_fault
    if do_cpu_sync:
        with pytest.raises(EPTimeoutError, match=r"rank 0 waited 2.0 s in collect: for rank 1"):
            dispatch(buffer)
    else:
        dispatch(buffer, do_cpu_sync=False)
        with pytest.raises(EPTimeoutError, match=r"rank 0 waited 2.0 s in collect: for rank 1"):
            buffer.get_comm_stream()
    num_launches = len(machine.launches)
    for call in (lambda: dispatch(buffer), buffer.barrier, buffer.get_comm_stream):
        with pytest.raises(EPError, match="must be rebuilt on every rank: an earlier call failed"):
            call()
    assert len(machine.launches) == num_launches
    buffer.destroy()
    assert machine.num_meetings == 1, "ranks that failed and ranks that did not take the same steps"
    assert machine.window.closed


def test_a_launch_that_fails_breaks_the_buffer(buffer: ElasticBuffer, machine: FakeMachine) -> None:
    def fail() -> None:
        raise EPError("a rank left the group")

    machine.on_launch = fail
    with pytest.raises(EPError, match="a rank left the group"):
        dispatch(buffer)
    with pytest.raises(EPError, match=r"must be rebuilt on every rank: a dispatch was left half-done .*a rank left"):
        buffer.barrier()


def test_nothing_goes_on_after_half_a_call(
    buffer: ElasticBuffer, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What sends has been launched, and there is no memory for what comes."""

    def allocate(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    machine.on_launch = lambda: machine.report_counts(3, 1, 0, 2, 5)
    monkeypatch.setattr(calls_dispatch.Payload, "new_empty", allocate)
    with pytest.raises(torch.OutOfMemoryError):
        dispatch(buffer)
    monkeypatch.undo()
    with pytest.raises(EPError, match=r"must be rebuilt on every rank: .* left half-done \(OutOfMemoryError"):
        dispatch(buffer, do_cpu_sync=False)


def test_who_gets_memory_of_a_call_that_failed_waits_for_its_kernels(
    buffer: ElasticBuffer, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what was launched; and though the device may have failed, too, it is the first error that is raised."""
    abandoned: list[object] = []

    def abandon(self: CallOrder) -> None:
        abandoned.append(self)
        raise RuntimeError("the device has failed")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CallOrder, "abandon", abandon)
    with monkeypatch.context() as patch:
        patch.setattr(HostCounts, "expect", interrupt)  # before the first launch
        with pytest.raises(KeyboardInterrupt):
            dispatch(buffer)
    assert abandoned == []
    monkeypatch.setattr(HostCounts, "have_come", interrupt)
    with pytest.raises(KeyboardInterrupt):
        dispatch(buffer)
    assert len(abandoned) == 1
    with pytest.raises(EPError, match=r"must be rebuilt on every rank: .* left half-done \(KeyboardInterrupt"):
        dispatch(buffer)


def test_who_is_interrupted_while_the_handle_is_made_has_no_results(
    buffer: ElasticBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its peers have theirs: who went on would mix batches."""

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(deep_ep.EPHandle, "remember", interrupt)
        with pytest.raises(KeyboardInterrupt):
            dispatch(buffer, do_cpu_sync=False)
    with pytest.raises(EPError, match=r"must be rebuilt on every rank: .* left half-done \(KeyboardInterrupt"):
        dispatch(buffer, do_cpu_sync=False)


def test_a_dispatch_that_fails_leaves_the_layout_of_its_handle(machine: FakeMachine) -> None:
    """It goes with other buffers of the same ranks."""
    machine.launches_finish = True
    buffer = build()
    handle = dispatch(buffer, do_cpu_sync=False)
    ends = handle.psum_num_recv_tokens_per_expert
    machine.on_launch = machine.leave_fault
    with pytest.raises(EPTimeoutError):
        buffer.dispatch(torch.zeros(3, HIDDEN, dtype=torch.bfloat16), handle=handle, do_expand=True)
    assert (handle.do_expand, handle.psum_num_recv_tokens_per_expert is ends) == (False, True)


@pytest.mark.parametrize("call", ["dispatch", "combine", "barrier"])
def test_a_fault_is_told_at_once_where_kernels_have_ended(machine: FakeMachine, call: str) -> None:
    machine.launches_finish = True
    buffer = build()
    handle = dispatch(buffer, do_cpu_sync=False)
    machine.on_launch = machine.leave_fault
    calls: dict[str, Callable[[], Any]] = {
        "dispatch": lambda: buffer.dispatch(torch.zeros(3, HIDDEN, dtype=torch.bfloat16), handle=handle),
        "combine": lambda: buffer.combine(torch.zeros(8, HIDDEN, dtype=torch.bfloat16), handle),
        "barrier": buffer.barrier,
    }
    with pytest.raises(EPTimeoutError, match=r"rank 0 waited 2.0 s in collect: for rank 1"):
        calls[call]()
    with pytest.raises(EPError, match="must be rebuilt on every rank: an earlier call failed"):
        buffer.barrier()


@pytest.mark.parametrize("end", ["destroy", "drop", "break the promise"])
def test_the_last_fault_is_logged(machine: FakeMachine, caplog: pytest.LogCaptureFixture, end: str) -> None:
    """Whoever cleans up has an error already, and must not get another instead of it."""
    buffer = build(explicitly_destroy=end == "break the promise")
    machine.on_launch = machine.leave_fault
    dispatch(buffer, do_cpu_sync=False)
    with caplog.at_level(logging.ERROR, "deep_ep"):
        if end == "destroy":
            buffer.destroy()
            buffer.destroy()
        del buffer
        gc.collect()
        dropped.free_parked()
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert "nobody was told: rank 0 waited 2.0 s in collect: for rank 1" in record.getMessage()
    assert machine.window.closed == (end != "break the promise")


def test_a_fault_that_was_told_is_not_told_again(machine: FakeMachine, caplog: pytest.LogCaptureFixture) -> None:
    buffer = build()
    machine.on_launch = machine.leave_fault
    dispatch(buffer, do_cpu_sync=False)
    with pytest.raises(EPTimeoutError):
        buffer.barrier(with_cpu_sync=True)
    with caplog.at_level(logging.ERROR, "deep_ep"):
        buffer.destroy()
    assert caplog.records == []


def test_a_broken_promise_is_logged(machine: FakeMachine, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "deep_ep"):
        buffer = build(explicitly_destroy=True)
        del buffer
        gc.collect()
    assert "dropped without destroy()" in caplog.text
    assert not machine.window.closed
