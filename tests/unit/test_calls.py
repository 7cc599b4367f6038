"""What calls have in common, on a machine that launches nothing: who may call, what is launched, how waits end."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import deep_ep
from deep_ep import ElasticBuffer
from deep_ep.calls import dispatch as calls_dispatch
from deep_ep.calls import endpoint
from deep_ep.errors import EPError, EPTimeoutError
from deep_ep.ops.arguments import FaultRecord
from deep_ep.ops.faults import READABLE

HIDDEN = 64


class FakeMemory:
    """A window, or words for the host."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.tensor = torch.zeros(num_bytes // 4 if num_bytes < 1 << 16 else 0, dtype=torch.int32)
        self.address = self.tensor.data_ptr()
        self.addresses = (0x1000,)
        self.closed = False

    def close(self) -> None:
        self.closed = True


class FakeMachine:
    """One rank. ``on_launch`` stands for the kernel."""

    name, device, comm_stream = "simulated", torch.device("cpu"), None
    num_sms, shared_bytes_per_block = 4, 232448
    wire_gbs: float | None = None

    def __init__(self) -> None:
        self.launches: list[tuple[str, int, int]] = []  # kernel, blocks, of which send
        self.on_launch: Callable[[], None] = lambda: None
        self.prepared: list[str] = []
        self.words: list[FakeMemory] = []
        self.num_barriers = self.num_meetings = self.num_closed = 0
        self.prepare_fails = False
        self.capture = 0
        self.answers: list[str | None] | None = None  # of all ranks, in a step that they end together

    def prepare(self, kernels: Any) -> None:
        self.prepared = [kernel.name for kernel in kernels]
        if self.prepare_fails:
            raise EPError("does not compile")

    def allocate_window(self, num_bytes: int) -> FakeMemory:
        self.window = FakeMemory(num_bytes)
        return self.window

    def host_words(self, count: int) -> FakeMemory:
        self.words.append(FakeMemory(4 * count))
        return self.words[-1]

    def launch(self, kernel: Any, args: Any, *, num_blocks: int, **_: Any) -> None:
        self.launches.append((kernel.name, num_blocks, args.num_send_blocks))
        self.on_launch()

    def current_capture(self) -> int:
        return self.capture

    def barrier(self, stream: Any = None) -> None:
        self.num_barriers += 1

    def meet(self, what: str, limit_s: float | None = None) -> None:
        self.num_meetings += 1
        self.meeting_limit_s = limit_s

    def all_gather_object(self, value: Any, what: str) -> list[Any]:
        return self.answers or [value]

    def close(self) -> None:
        self.num_closed += 1

    def leave_fault(self, record: int = 0) -> None:
        """What a kernel writes whose wait has timed out; or as a notice, whose wait takes long."""
        fault = FaultRecord(state=READABLE, phase=3, peer=1, waited_ns=2_000_000_000)
        address = self.words[-2].address + record * ctypes.sizeof(fault)
        ctypes.memmove(address, ctypes.addressof(fault), ctypes.sizeof(fault))

    def report_counts(self, rows: int, *selections: int) -> None:
        self.words[1].tensor[: 2 + len(selections)] = torch.tensor([1, rows, *selections])


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMachine]:
    machine = FakeMachine()
    monkeypatch.setattr(endpoint, "open_machine", lambda group, environment, limits: machine)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield machine
    dist.destroy_process_group()


@pytest.fixture
def buffer(machine: FakeMachine) -> ElasticBuffer:
    return build()


def build(**settings: Any) -> ElasticBuffer:
    group = dist.group.WORLD
    assert group is not None
    return ElasticBuffer(group, num_max_tokens_per_rank=8, hidden=HIDDEN, num_topk=2, **settings)


def dispatch(buffer: ElasticBuffer, **changes: Any) -> deep_ep.EPHandle:
    idx = torch.zeros(3, 1, dtype=deep_ep.topk_idx_t)
    x = torch.zeros(3, HIDDEN, dtype=torch.bfloat16)
    return buffer.dispatch(x, topk_idx=idx, num_experts=4, **changes)[3]


def test_kernels_are_ready_before_the_first_collective_step(machine: FakeMachine, buffer: ElasticBuffer) -> None:
    """One dispatch for each origin of places, one combine for each way that rows come home."""
    assert machine.prepared == ["dispatch"] * 2 + ["combine"] * 3


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
    gather = {None: [None, None]}  # the step in which all say that they are well
    monkeypatch.setattr(machine, "all_gather_object", lambda value, what: gather.get(value, [value, "0123456789ab"]))
    with pytest.raises(
        EPError, match=r"different versions of deep_ep: rank 0 has headers \w{12}, rank 1 0123456789ab;"
    ):
        build()
    assert machine.num_closed == 1


def test_exact_sizes(machine: FakeMachine, buffer: ElasticBuffer) -> None:
    """Senders report the counts, the host allocates, receivers fill."""
    machine.on_launch = lambda: machine.report_counts(3, 1, 0, 2, 5)
    handle = dispatch(buffer, num_sms=4, expert_alignment=4)
    assert machine.launches == [("dispatch", 4, 4), ("dispatch", 4, 0)]
    assert handle.num_recv_tokens == handle.recv_src_metadata.shape[0] == 3
    assert handle.num_recv_tokens_per_expert_list == [4, 0, 4, 8]
    assert handle.num_expanded_tokens == 16


def test_worst_case_sizes(machine: FakeMachine, buffer: ElasticBuffer) -> None:
    handle = dispatch(buffer, num_sms=1, do_cpu_sync=False, num_max_tokens_per_rank=5, expert_alignment=8)
    assert machine.launches == [("dispatch", 1, 1), ("dispatch", 1, 0)]
    assert handle.num_recv_tokens == 5
    assert handle.num_recv_tokens_per_expert_list == []
    assert handle.num_expanded_tokens == 40  # align(5 * 1 + 7 * 4, 8)


def test_sizes_of_the_expanded_layout(machine: FakeMachine, buffer: ElasticBuffer) -> None:
    idx = torch.zeros(3, 2, dtype=deep_ep.topk_idx_t)
    arguments = {"topk_idx": idx, "topk_weights": torch.ones(3, 2), "num_experts": 4, "expert_alignment": 4}
    x = (torch.zeros(3, HIDDEN).to(torch.float8_e4m3fn), torch.zeros(3, 1))
    layout = {"do_expand": True, "use_tma_aligned_col_major_sf": True}
    machine.on_launch = lambda: machine.report_counts(3, 1, 0, 2, 5)
    (x8, sf), recv_idx, weights, handle, _ = buffer.dispatch(x, **arguments, **layout)
    assert (recv_idx, weights.shape, x8.shape, sf.shape, sf.stride()) == (None, (16,), (16, HIDDEN), (16, 1), (1, 16))
    assert (handle.num_recv_tokens, handle.num_expanded_tokens, handle.do_expand) == (3, 16, True)
    assert handle.recv_src_metadata.shape == (3, 4)

    (x8, _), _, weights, handle, _ = buffer.dispatch(x, **arguments, **layout, do_cpu_sync=False)
    assert len(x8) == len(weights) == handle.num_expanded_tokens == 28  # align(8 * 2 + 3 * 4, 4)
    assert handle.num_recv_tokens == len(handle.recv_src_metadata) == 8
    (x8, sf), recv_idx, weights, _, _ = buffer.dispatch(x, **arguments, do_cpu_sync=False)
    assert (recv_idx.shape, weights.shape, x8.shape, sf.stride()) == ((8, 2), (8, 2), (8, HIDDEN), (1, 1))


def test_known_routes(machine: FakeMachine, buffer: ElasticBuffer) -> None:
    """One launch, no wait for counts, the sizes of the handle; the layout is this call's."""
    machine.on_launch = lambda: machine.report_counts(3, 1, 0, 2, 5)
    handle = dispatch(buffer, num_sms=3, expert_alignment=4)
    machine.launches.clear()
    machine.on_launch = lambda: None
    x = torch.zeros(3, 2 * HIDDEN, dtype=torch.bfloat16)[:, :HIDDEN]
    plain, idx, weights, same, _ = buffer.dispatch(x, handle=handle)
    assert (plain.shape, idx.shape, weights, same is handle) == ((3, HIDDEN), (3, 1), None, True)
    assert machine.launches == [("dispatch", 4, 1)], "num_sms=0 is the analytic choice"
    expanded, idx, weights, _, _ = buffer.dispatch(x, handle=handle, topk_weights=torch.ones(3, 1), do_expand=True)
    assert (expanded.shape, idx, weights.shape) == ((16, HIDDEN), None, (16,))
    assert handle.do_expand
    assert handle.psum_num_recv_tokens_per_expert is handle.per_expert_end
    assert handle.num_sms == 3


def test_handle_keeps_a_copy_unless_told_otherwise(buffer: ElasticBuffer) -> None:
    x, idx = torch.zeros(1, HIDDEN, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=deep_ep.topk_idx_t)
    copied = buffer.dispatch(x, topk_idx=idx, num_experts=4, do_cpu_sync=False)[3]
    kept = buffer.dispatch(x, topk_idx=idx, num_experts=4, do_cpu_sync=False, do_handle_copy=False)[3]
    assert copied.topk_idx.data_ptr() != idx.data_ptr() == kept.topk_idx.data_ptr()


def test_analytic_num_sms(machine: FakeMachine, buffer: ElasticBuffer) -> None:
    """Not more than there are; combine takes what dispatch took."""
    assert dispatch(buffer, do_cpu_sync=False).num_sms == 4
    handle = dispatch(buffer, do_cpu_sync=False, num_sms=2)
    buffer.combine(torch.zeros(8, HIDDEN, dtype=torch.bfloat16), handle)
    assert [launch[:2] for launch in machine.launches] == [("dispatch", 4), ("dispatch", 2), ("combine", 2)]


def test_analytic_num_sms_follows_the_link(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the caller says, or else the environment, or else NVML; and an H200's where nobody says anything."""
    assert build().get_theoretical_num_sms(256, 8) == 8
    assert build().get_theoretical_num_sms(256, 8, nvlink_gbs=730) == 16
    assert build().get_theoretical_num_sms(256, 8, sm_write_gbs=25) == 16
    assert build().get_theoretical_num_sms(256, 8, sm_read_gbs=25) == 16
    machine.wire_gbs = 18 * 53.125
    assert build().get_theoretical_num_sms(256, 8) == 16
    monkeypatch.setenv("EP_NVLINK_GBS", "100")
    assert build().get_theoretical_num_sms(256, 8) == 4
    with pytest.raises(ValueError, match="sm_write_gbs must be a number of GB/s more than 0, but it is 0"):
        build().get_theoretical_num_sms(256, 8, sm_write_gbs=0)


def test_counts_that_never_come(buffer: ElasticBuffer, machine: FakeMachine) -> None:
    impatient = build(num_cpu_timeout_secs=0.01)
    with pytest.raises(EPTimeoutError, match=r"rank 0 waited 0.01 s for the counts .* num_cpu_timeout_secs") as caught:
        dispatch(impatient)
    assert caught.value.report is not None
    assert (caught.value.report.rank, caught.value.report.phase) == (0, "for the counts of a dispatch")
    with pytest.raises(EPError, match="this buffer must be rebuilt on every rank: the host waited in vain for the cou"):
        dispatch(impatient)


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
    with pytest.raises(EPTimeoutError):
        buffer.destroy()
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
    """The sending half has run, and there is no memory for what comes."""

    def allocate(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    machine.on_launch = lambda: machine.report_counts(3, 1, 0, 2, 5)
    monkeypatch.setattr(calls_dispatch.Outputs, "allocate", allocate)
    with pytest.raises(torch.OutOfMemoryError):
        dispatch(buffer)
    monkeypatch.undo()
    with pytest.raises(EPError, match=r"must be rebuilt on every rank: .* left half-done \(OutOfMemoryError"):
        dispatch(buffer, do_cpu_sync=False)


def test_the_last_fault_is_told(machine: FakeMachine) -> None:
    """By a barrier, and by destroy, which gives the memory back first."""
    for end in ("barrier", "destroy"):
        buffer = build()
        machine.on_launch = machine.leave_fault
        dispatch(buffer, do_cpu_sync=False)
        with pytest.raises((EPTimeoutError, EPError), match=r"rank 0 waited 2.0 s in collect"):
            getattr(buffer, end)()
    assert machine.window.closed


def test_no_host_wait_while_a_graph_is_captured(buffer: ElasticBuffer, machine: FakeMachine) -> None:
    machine.capture = 1
    with pytest.raises(ValueError, match="do_cpu_sync must be False inside a CUDA graph capture"):
        dispatch(buffer)
    with pytest.raises(ValueError, match="with_cpu_sync must be False inside a CUDA graph capture"):
        buffer.barrier(with_cpu_sync=True)
    assert (machine.launches, machine.num_barriers) == ([], 0)
    buffer.barrier()
    dispatch(buffer, do_cpu_sync=False)
    assert (len(machine.launches), machine.num_barriers) == (1, 1)


def test_calls_are_named_for_profilers(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    @contextlib.contextmanager
    def name(text: str) -> Iterator[None]:
        log.append(text)
        yield
        log.append("end")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range", name)
    machine.on_launch = lambda: machine.report_counts(3, 1, 0, 2, 5)
    silent = build()
    monkeypatch.setenv("EP_USE_NVIDIA_TOOLS", "1")
    buffer = build()
    machine.words[1] = machine.words[-1]
    dispatch(silent, do_cpu_sync=False)
    assert log == []
    handle = dispatch(buffer)
    buffer.combine(torch.zeros(3, HIDDEN, dtype=torch.bfloat16), handle)
    buffer.barrier()
    named = ["deep_ep dispatch", "deep_ep wait for counts", "end", "end", "deep_ep combine", "end"]
    assert log == [*named, "deep_ep barrier", "end"]


def test_destroy_twice(buffer: ElasticBuffer, machine: FakeMachine) -> None:
    buffer.destroy()
    buffer.destroy()
    assert (machine.num_meetings, machine.num_closed, machine.window.closed) == (1, 1, True)
    with pytest.raises(ValueError, match="this buffer was destroyed; build a new ElasticBuffer"):
        dispatch(buffer)


def test_a_dropped_buffer_talks_to_nobody(machine: FakeMachine) -> None:
    buffer = build()
    del buffer
    gc.collect()
    assert (machine.num_meetings, machine.num_closed, machine.window.closed) == (0, 1, True)


def test_a_broken_promise_is_logged(machine: FakeMachine, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "deep_ep"):
        buffer = build(explicitly_destroy=True)
        del buffer
        gc.collect()
    assert "dropped without destroy()" in caplog.text
    assert not machine.window.closed


def test_nothing_is_freed_while_a_graph_is_captured(machine: FakeMachine) -> None:
    buffer = build()
    machine.capture = 1
    del buffer
    gc.collect()
    assert not machine.window.closed


def test_memory_report_names_every_byte(buffer: ElasticBuffer) -> None:
    *regions, whole = buffer.memory_report().splitlines()
    sizes = [int(line.split()[0].replace(",", "")) for line in regions]
    assert whole.split()[0] == f"{buffer.num_bytes:,}"
    assert 0 <= buffer.num_bytes - sum(sizes) < 256 * len(sizes), "all but what aligns the regions"


def test_attributes(buffer: ElasticBuffer) -> None:
    """What frameworks read."""
    assert (buffer.rank_idx, buffer.num_ranks) == (0, 1)
    assert (buffer.scaleout_rank_idx, buffer.scaleup_rank_idx) == (0, 0)
    assert buffer.get_logical_domain_size() == (buffer.num_scaleout_ranks, buffer.num_scaleup_ranks) == (1, 1)
    assert buffer.get_physical_domain_size() == (buffer.num_rdma_ranks, buffer.num_nvlink_ranks) == (1, 1)
    assert buffer.num_bytes == ElasticBuffer.get_buffer_size_hint(buffer.group, 8, HIDDEN, 2)
    assert buffer.num_max_tokens_per_rank == 8
    for name in ("allow_hybrid_mode", "allow_multiple_reduction", "prefer_overlap_with_compute"):
        assert getattr(buffer, name) is True
    assert buffer.deterministic is buffer.explicitly_destroy is False
    assert buffer.num_allocated_qps == buffer.get_theoretical_num_qps(24) == 0
