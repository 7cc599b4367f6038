"""What calls have in common, on a machine that launches nothing: who may call, what is launched, how waits end."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

import deep_ep
from deep_ep import ElasticBuffer, EventHandle, EventOverlap, autograd, layout, sm_model
from deep_ep.calls.expected import NO_LIMIT, least_of
from deep_ep.calls.payload import Payload
from deep_ep.ops.dispatch import DispatchArgs
from deep_ep.sm_model import Kind
from tests.unit.fake_machine import HIDDEN, FakeMachine, build, dispatch, others_differ


def test_kernels_are_ready_before_the_first_collective_step(machine: FakeMachine, buffer: ElasticBuffer) -> None:
    """One dispatch for each origin of places, one combine for each way that rows come home."""
    assert machine.prepared == ["dispatch"] * 2 + ["combine"] * 3 + ["barrier"]


def test_buffers_of_the_same_ranks_have_different_numbers(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = [build()._endpoint.window_argument.number for _ in range(2)]
    assert numbers[1] == numbers[0] + 1
    others_differ(machine, monkeypatch, num_built=1000)  # it has built some alone, whatever for
    numbers = [build()._endpoint.window_argument.number for _ in range(2)]
    assert numbers == [1000, 1001]


def test_exact_sizes(machine: FakeMachine, buffer: ElasticBuffer) -> None:
    """Senders and counters report the counts, the host allocates, and then all receive."""
    machine.on_launch = lambda: machine.report_counts(3, 1, 0, 2, 5)
    handle = dispatch(buffer, num_sms=4, expert_alignment=4)
    assert machine.launches == [("dispatch", 2, 1), ("dispatch", 4, 0)]
    assert handle.num_recv_tokens == handle.recv_src_metadata.shape[0] == 3
    assert handle.num_recv_tokens_per_expert_list == [4, 0, 4, 8]
    assert handle.num_expanded_tokens == 16


class Told(NamedTuple):
    """What a launch of a dispatch is told."""

    num_blocks: int
    num_receive_blocks: int
    blocks_in_all: int
    reports: bool
    rows: int
    expanded_rows: int


class Launches:
    """Launches of dispatches that report these counts."""

    def __init__(self, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[Told] = []
        self.counts = [3, 1, 0, 2, 5]
        self._machine = machine
        monkeypatch.setattr(machine, "launch", self._launch)

    def _launch(self, kernel: object, args: DispatchArgs, *, num_blocks: int, **_: object) -> None:
        reports, to = bool(args.host_words), args.received
        self.told.append(Told(num_blocks, args.num_receive_blocks, args.num_blocks, reports, to.rows, to.expanded_rows))
        if reports:
            self._machine.report_counts(*self.counts)

    def of(self, call: Callable[[], Any]) -> list[Told]:
        self.told.clear()
        call()
        return list(self.told)


@pytest.fixture
def launches(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> Launches:
    return Launches(machine, monkeypatch)


def test_what_was_expected_is_received_at_once(launches: Launches, buffer: ElasticBuffer) -> None:
    """Blocks are counted as if there were a second launch. What is returned is as long as what came."""
    assert launches.of(lambda: dispatch(buffer)) == [Told(2, 0, 6, True, 0, 0), Told(4, 4, 6, False, 3, 8)]
    assert launches.of(lambda: dispatch(buffer)) == [Told(4, 3, 8, True, 8, NO_LIMIT)], "the worst case is 8"
    assert len(launches.of(lambda: dispatch(buffer, expert_alignment=4))) == 2, "of another shape nothing is known"
    handle = dispatch(buffer, expert_alignment=4)
    assert handle.num_recv_tokens == handle.recv_src_metadata.shape[0] == 3
    assert (handle.num_recv_tokens_per_expert_list, handle.num_expanded_tokens) == ([4, 0, 4, 8], 16)


def test_what_is_expanded_is_expected_too(launches: Launches, buffer: ElasticBuffer) -> None:
    arguments = {"topk_idx": torch.zeros(3, 2, dtype=deep_ep.topk_idx_t), "topk_weights": torch.ones(3, 2)}
    x = (torch.zeros(3, HIDDEN).to(torch.float8_e4m3fn), torch.zeros(3, 1))

    def call(**layout: Any) -> Any:
        return buffer.dispatch(x, **arguments, num_experts=4, expert_alignment=4, do_expand=True, **layout)

    call()
    assert launches.of(call) == [Told(4, 3, 8, True, 8, 28)], "the worst case"
    launches.counts = [3, 1, 0, 2, 0]
    (x8, sf), _, weights, handle, _ = call()
    assert (x8.shape, sf.shape, weights.shape) == ((8, HIDDEN), (8, 1), (8,))
    assert x8.is_contiguous()
    assert handle.recv_src_metadata.shape == (3, 4)
    first, second = launches.of(lambda: call(use_tma_aligned_col_major_sf=True))
    assert (first.num_receive_blocks, second.expanded_rows) == (0, 8), "its strides say how many rows there are"


def test_what_was_not_expected(launches: Launches) -> None:
    buffer = ElasticBuffer(dist.group.WORLD, num_max_tokens_per_rank=10_000, hidden=HIDDEN, num_topk=2)

    def take(rows: int) -> list[tuple[int, bool, int]]:
        launches.counts = [rows, rows, 0, 0, 0]
        return [(each.num_receive_blocks, each.reports, each.rows) for each in launches.of(lambda: dispatch(buffer))]

    assert take(1000) == [(0, True, 0), (4, False, 1000)]
    assert take(1032) == [(3, True, 1031), (4, False, 1032)], "too many"
    assert take(1064) == [(3, True, 1064)], "just enough"
    most = 1064 + 1064 // 32
    assert take(least_of(most) - 1) == [(3, True, most), (4, False, least_of(most) - 1)], "memory would stay unused"
    assert take(1000) == [(0, True, 0), (4, False, 1000)], "who can tell"


def test_where_nothing_is_received_at_once(launches: Launches, buffer: ElasticBuffer) -> None:
    """One block cannot send and receive at a time, and before an event no output may be written."""
    recorded = EventHandle.inert()
    recorded.event = torch.cuda.Event
    for arguments, at_once in (
        ({"num_sms": 1}, False),
        ({"previous_event_before_epilogue": EventOverlap(recorded)}, False),
        ({"previous_event_before_epilogue": EventOverlap()}, True),
    ):
        dispatch(buffer, **arguments)
        told = launches.of(lambda arguments=arguments: dispatch(buffer, **arguments))
        assert [each.num_receive_blocks > 0 for each in told] == ([True] if at_once else [False, True])
        assert {each.blocks_in_all for each in told} == {told[0].num_blocks + arguments.get("num_sms", 4)}


def test_no_memory_for_what_is_expected(
    launches: Launches, buffer: ElasticBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is enough for what comes."""
    new_empty = Payload.new_empty

    def allocate(self: Payload, num_rows: int, **layout: bool) -> Payload:
        if num_rows > 3:
            raise torch.OutOfMemoryError
        return new_empty(self, num_rows, **layout)

    dispatch(buffer)
    monkeypatch.setattr(Payload, "new_empty", allocate)
    assert [each.num_receive_blocks for each in launches.of(lambda: dispatch(buffer))] == [0, 4]


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


@pytest.mark.parametrize("do_cpu_sync", [True, False])
@pytest.mark.parametrize("do_handle_copy", [True, False])
def test_what_is_given_is_not_written(
    machine: FakeMachine,
    buffer: ElasticBuffer,
    monkeypatch: pytest.MonkeyPatch,
    do_handle_copy: bool,
    do_cpu_sync: bool,
) -> None:
    """Simulated ranks write back what a kernel may write; it may be memory that nobody can write to."""
    idx = torch.zeros(3, 1, dtype=deep_ep.topk_idx_t)
    x = torch.zeros(3, HIDDEN, dtype=torch.bfloat16)
    written: list[torch.Tensor] = []

    def launch(*_: object, writes: Sequence[torch.Tensor | None], **__: object) -> None:
        written.extend(each for each in writes if each is not None)
        machine.report_counts(3, 1, 0, 2, 5)

    monkeypatch.setattr(machine, "launch", launch)
    arguments = {"topk_idx": idx, "num_experts": 4, "do_handle_copy": do_handle_copy, "do_cpu_sync": do_cpu_sync}
    for _ in range(2):
        handle = buffer.dispatch(x, **arguments)[3]
    assert not any(each is idx or each is x for each in written)
    assert (handle.topk_idx is idx) == (not do_handle_copy)
    assert any(each is handle.topk_idx for each in written) == do_handle_copy


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
    """Not more than there are; combine takes what dispatch was told."""
    assert dispatch(buffer, do_cpu_sync=False).num_sms == 4
    handle = dispatch(buffer, do_cpu_sync=False, num_sms=2)
    buffer.combine(torch.zeros(8, HIDDEN, dtype=torch.bfloat16), handle)
    assert [launch[:2] for launch in machine.launches] == [("dispatch", 4), ("dispatch", 2), ("combine", 2)]


@pytest.mark.parametrize("adds_first", [False, True])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_each_kind_of_call_has_its_own_number(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, with_gradients: bool, adds_first: bool
) -> None:
    """Where nobody says one; what the dispatch was told, its combine and its gradient take too."""
    machine.num_sms, sms = 132, {kind: max(sm_model.FEW_TOKENS_SMS.values()) + i for i, kind in enumerate(Kind)}
    monkeypatch.setattr(sm_model, "table", lambda *_: {kind: (0, 0, sms[kind]) for kind in Kind})  # of 2 selections
    buffer = build(allow_multiple_reduction=adds_first)
    idx = torch.tensor([[0, 1]] * 3, dtype=deep_ep.topk_idx_t)
    x, given = torch.zeros(3, HIDDEN, dtype=torch.bfloat16), {"topk_idx": idx, "num_experts": 4, "do_cpu_sync": False}

    def taken(expand: bool, **told: int) -> list[int]:
        machine.launches.clear()
        if with_gradients:
            asking = x.clone().requires_grad_()
            rows, _, _, handle = autograd.dispatch(buffer, asking, do_expand=expand, **given, **told)
            autograd.combine(buffer, rows, handle)[0].sum().backward()
        else:
            rows, _, _, handle, _ = buffer.dispatch(x, do_expand=expand, **given, **told)
            buffer.combine(rows, handle)
        assert handle.num_sms == machine.launches[0][1]
        return [num_blocks for _, num_blocks, _ in machine.launches]

    calls_of_each = 2 if with_gradients else 1  # the gradient of one is the other
    sums = Kind.COMBINE_OF_SUMS if adds_first else Kind.COMBINE_OF_EVERY_ROW
    assert taken(False) == [sms[Kind.DISPATCH], sms[Kind.COMBINE]] * calls_of_each
    assert taken(True) == [sms[Kind.EXPANDED_DISPATCH], sms[sums]] * calls_of_each
    for expand in (False, True):
        assert taken(expand, num_sms=6) == [6, 6] * calls_of_each


@pytest.mark.parametrize("num_sms", [132, 20])
@pytest.mark.parametrize("expand", [False, True])
def test_calls_of_few_tokens_take_more(machine: FakeMachine, num_sms: int, expand: bool) -> None:
    """As many as the device has, at most, and none that they were not told."""
    machine.num_sms, tokens = num_sms, sm_model.FEW_TOKENS
    kinds = (Kind.EXPANDED_DISPATCH, Kind.COMBINE_OF_SUMS) if expand else (Kind.DISPATCH, Kind.COMBINE)
    buffer = ElasticBuffer(dist.group.WORLD, num_max_tokens_per_rank=tokens + 1, hidden=HIDDEN, num_topk=2)
    enough = [buffer._endpoint.enough_sms[kind][1] for kind in kinds]

    def taken(tokens: int, **told: int) -> list[int]:
        x, idx = torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16), torch.zeros(tokens, 1, dtype=deep_ep.topk_idx_t)
        rows, _, _, handle, _ = buffer.dispatch(
            x, topk_idx=idx, num_experts=4, do_cpu_sync=False, do_expand=expand, **told
        )
        buffer.combine(rows, handle)
        return [num_blocks for _, num_blocks, _ in machine.launches[-2:]]

    assert taken(tokens) == [min(sm_model.FEW_TOKENS_SMS[kind], num_sms) for kind in kinds] > enough
    assert taken(tokens + 1) == taken(sm_model.VERY_FEW_TOKENS) == enough
    assert taken(tokens, num_sms=6) == [6, 6]


def test_analytic_num_sms_follows_the_link(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the caller says, or else the environment, or else NVML; and an H200's where nobody says anything."""
    machine.num_sms = 132
    assert build().get_theoretical_num_sms(256, 8) == 10
    assert build().get_theoretical_num_sms(256, 8, nvlink_gbs=730) == 20
    assert build().get_theoretical_num_sms(256, 8, sm_write_gbs=25) == 16
    assert build().get_theoretical_num_sms(256, 8, sm_read_gbs=50) == 18
    machine.wire_gbs = 18 * 53.125
    assert build().get_theoretical_num_sms(256, 8) == 20
    monkeypatch.setenv("EP_NVLINK_GBS", "100")
    assert build().get_theoretical_num_sms(256, 8) == 4
    with pytest.raises(ValueError, match=r"sm_write_gbs must be from 0.001 to 1000000 GB/s, but it is 0"):
        build().get_theoretical_num_sms(256, 8, sm_write_gbs=0)
    with pytest.raises(
        ValueError, match=r"nvlink_gbs must be from .* GB/s, or 0 for what the machine tells, but it is -1"
    ):
        build().get_theoretical_num_sms(256, 8, nvlink_gbs=-1)


def test_analytic_num_sms_is_what_a_call_takes(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not more than the device has, nor than the window has room for; and even, for whoever asks."""
    monkeypatch.setattr(machine, "name", "cuda")
    machine.memory_gbs = 1e6
    for machine.num_sms, most in ((4, 4), (7, 6), (132, 132), (layout.MAX_BLOCKS + 28, layout.MAX_BLOCKS)):
        buffer = build()
        assert buffer.get_theoretical_num_sms(256, 8, nvlink_gbs=1e5) == most
        assert dispatch(buffer, do_cpu_sync=False, num_sms=most).num_sms == most
        with pytest.raises(ValueError, match="num_sms must be from 1 to"):
            dispatch(buffer, do_cpu_sync=False, num_sms=machine.num_sms + 1)
        with monkeypatch.context() as patch:
            patch.setenv("EP_NVLINK_GBS", "100000")
            assert dispatch(build(), do_cpu_sync=False).num_sms // 2 * 2 == most


def test_no_host_wait_while_a_graph_is_captured(buffer: ElasticBuffer, machine: FakeMachine) -> None:
    machine.capture = 1
    with pytest.raises(ValueError, match="do_cpu_sync must be False inside a CUDA graph capture"):
        dispatch(buffer)
    with pytest.raises(ValueError, match="with_cpu_sync must be False inside a CUDA graph capture"):
        buffer.barrier(with_cpu_sync=True)
    assert machine.launches == []
    buffer.barrier()
    dispatch(buffer, do_cpu_sync=False)
    assert [name for name, *_ in machine.launches] == ["barrier", "dispatch"]


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


def test_handles_are_themselves_and_nothing_else(buffer: ElasticBuffer) -> None:
    """Their tensors could not be compared with ==; and whoever keeps them by layer wants to hash them."""
    one, other = (dispatch(buffer, do_cpu_sync=False) for _ in range(2))
    assert one == one
    assert one != other
    assert len({one, other, one}) == 2


# Threads


def test_a_call_waits_for_that_of_another_thread(buffer: ElasticBuffer, machine: FakeMachine) -> None:
    """And looks again then at whether the buffer can still be used."""
    entered, goes_on, errors = threading.Event(), threading.Event(), list[str]()

    def kernel() -> None:
        entered.set()
        assert goes_on.wait(20)
        buffer.destroy()

    def call() -> None:
        try:
            dispatch(buffer, do_cpu_sync=False)
        except ValueError as error:
            errors.append(str(error))

    machine.on_launch = kernel
    first, second = threading.Thread(target=call), threading.Thread(target=call)
    first.start()
    assert entered.wait(20)
    second.start()
    second.join(0.1)
    assert second.is_alive()
    goes_on.set()
    first.join()
    second.join()
    assert len(machine.launches) == 1
    assert errors == ["this buffer was destroyed; build a new ElasticBuffer"]
