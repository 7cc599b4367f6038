"""What calls remember of earlier ones: plans of shapes, and handles that were seen to be right."""

from __future__ import annotations

import copy
import ctypes
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import deep_ep
from deep_ep import ElasticBuffer, EPHandle
from deep_ep.machine.relocation import pointer_fields
from tests.unit.fake_machine import HIDDEN, FakeMachine, build, dispatch


@pytest.fixture
def launched(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """All that a launch is told, but for addresses."""
    launched: list[tuple[Any, ...]] = []

    def launch(kernel: Any, args: Any, *, num_blocks: int, shared_bytes: int, meets_peers: bool, **_: Any) -> None:
        own = type(args).from_buffer_copy(args)
        for _, offset in pointer_fields(type(args)):
            pointer = ctypes.c_uint64.from_buffer(own, offset)
            pointer.value = pointer.value != 0
        launched.append((kernel, bytes(own), num_blocks, shared_bytes, meets_peers))

    monkeypatch.setattr(machine, "launch", launch)
    return launched


def rows(num_rows: int, hidden: int = HIDDEN) -> torch.Tensor:
    return torch.zeros(num_rows, hidden, dtype=torch.bfloat16)


def calls(buffer: ElasticBuffer) -> list[Callable[[], Any]]:
    """Calls of which any two differ in something that the kernels are told."""
    idx = {k: torch.zeros(3, k, dtype=deep_ep.topk_idx_t) for k in (1, 2)}
    x8 = torch.zeros(3, HIDDEN).to(torch.float8_e4m3fn)
    pairs = [(x8, torch.zeros(3, count)) for count in (1, 4)]
    handles = [dispatch(buffer, do_cpu_sync=False, expert_alignment=alignment) for alignment in (1, 4)]
    weights = {k: torch.ones(3, k) for k in (1, 2)}
    few = {"topk_idx": idx[1], "num_experts": 4, "do_cpu_sync": False}

    def dispatching(x: Any = None, **how: Any) -> Callable[[], Any]:
        return lambda: buffer.dispatch(rows(3) if x is None else x, **how)

    def combining(handle: EPHandle, expand: bool, **how: Any) -> Callable[[], Any]:
        def combine() -> None:
            handle.do_expand = expand
            buffer.combine(rows(handle.num_expanded_tokens if expand else handle.num_recv_tokens), handle, **how)

        return combine

    return [
        dispatching(**few),
        dispatching(rows(3, 2 * HIDDEN), **few),
        dispatching(rows(2), **{**few, "topk_idx": idx[1][:2]}),
        dispatching(pairs[0], **few),
        dispatching(pairs[1], **few),
        dispatching(**few, topk_weights=weights[1]),
        dispatching(**{**few, "topk_idx": idx[2]}),
        dispatching(**{**few, "num_experts": 8}),
        dispatching(**few, num_max_tokens_per_rank=5),
        dispatching(**few, expert_alignment=8),
        dispatching(**few, num_sms=1),
        dispatching(**few, num_sms=2),
        dispatching(**few, do_expand=True),
        dispatching(**few, do_expand=True, do_zero_padding=True),
        *(dispatching(handle=handle) for handle in handles),
        dispatching(handle=handles[0], do_expand=True),
        dispatching(handle=handles[0], topk_weights=weights[1]),
        combining(handles[0], expand=False),
        combining(handles[0], expand=True),
        combining(handles[0], expand=False, num_sms=1),
        combining(handles[0], expand=False, topk_weights=torch.ones(8, 1)),
        combining(handles[0], expand=False, bias=rows(3)),
    ]


@pytest.mark.parametrize("allow_multiple_reduction", [False, True])
def test_a_plan_is_of_its_shape_alone(launched: list[tuple[Any, ...]], allow_multiple_reduction: bool) -> None:
    """Kernels are told the same whether their call's shape has been planned before or not."""
    buffer = build(allow_multiple_reduction=allow_multiple_reduction)
    all_calls = calls(buffer)
    endpoint = buffer._end()

    def told(call: Callable[[], Any]) -> list[tuple[Any, ...]]:
        launched.clear()
        call()
        return list(launched)

    fresh = []
    for call in all_calls:
        endpoint.plans.clear()
        fresh.append(told(call))
    assert all(one != other for one, other in itertools.combinations(fresh, 2))
    first = [told(call) for call in all_calls]
    num_plans = len(endpoint.plans)
    assert [told(call) for call in reversed(all_calls)] == fresh[::-1]
    assert first == fresh
    assert len(endpoint.plans) == num_plans, "nothing was planned twice"


def test_plans_are_no_leak(buffer: ElasticBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deep_ep.calls.endpoint.MAX_PLANS", 3)
    for alignment in range(1, 10):
        dispatch(buffer, do_cpu_sync=False, expert_alignment=alignment)
        assert 1 <= len(buffer._end().plans) <= 3


def test_what_does_not_fit_is_refused_every_time(buffer: ElasticBuffer) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="num_max_tokens_per_rank 1000000 with 128 bytes a token and"):
            dispatch(buffer, do_cpu_sync=False, num_max_tokens_per_rank=1_000_000)


def test_kernels_of_calls_are_the_objects_that_were_prepared(
    machine: FakeMachine, launched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU knows them by that."""
    prepared: list[Any] = []
    monkeypatch.setattr(machine, "prepare", prepared.extend)
    buffer = build()
    for call in calls(buffer):
        call()
    buffer.barrier()
    assert {id(kernel) for kernel, *_ in launched} <= {id(kernel) for kernel in prepared}


WRONG: dict[str, Any] = {
    "num_experts": 3,
    "expert_alignment": 4,
    "num_max_tokens_per_rank": 4,
    "num_recv_tokens": 7,
    "num_expanded_tokens": 1,
    "num_recv_tokens_per_expert_list": [1, 2],
    "topk_idx": torch.zeros(3, 2, dtype=deep_ep.topk_idx_t),
    "dst_buffer_slot_idx": torch.zeros(2, 1, dtype=torch.int32),
    "recv_src_metadata": torch.zeros(8, 3, dtype=torch.int64),
    "psum_num_recv_tokens_per_scaleup_rank": torch.zeros(2, dtype=torch.int32),
    "psum_num_recv_tokens_per_expert": torch.zeros(5, dtype=torch.int32),
    "num_unaligned_recv_tokens_per_expert": torch.zeros(8, dtype=torch.int32)[::2],
    "per_expert_aligned": torch.zeros(5, dtype=torch.int32),
    "per_expert_end": torch.zeros(5, dtype=torch.int32),
    "number": torch.zeros(1, dtype=torch.int64),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_handle_that_was_changed_is_refused(buffer: ElasticBuffer, machine: FakeMachine, name: str) -> None:
    """However often the one that it comes from was right."""
    handle = dispatch(buffer, do_cpu_sync=False)
    changed = EPHandle(**{**vars(handle), name: WRONG[name]})
    for _ in range(2):
        buffer.dispatch(rows(3), handle=handle)
        num_launches = len(machine.launches)
        for call in (lambda: buffer.dispatch(rows(3), handle=changed), lambda: buffer.combine(rows(8), changed)):
            with pytest.raises(ValueError, match="of a handle only do_expand may be set"):
                call()
        assert len(machine.launches) == num_launches


def test_a_handle_is_looked_at_once(buffer: ElasticBuffer) -> None:
    """One that a dispatch has made not at all; another one when it is used first."""
    handle = dispatch(buffer, do_cpu_sync=False)
    assert handle.is_known
    seen = handle.kept
    for expand in (False, True, False):
        buffer.dispatch(rows(3), handle=handle, do_expand=expand)
        assert handle.kept is seen
    for twin in (copy.copy(handle), copy.deepcopy(handle), pickle.loads(pickle.dumps(handle))):
        assert not twin.is_known
        buffer.dispatch(rows(3), handle=twin)
        assert twin.is_known
        assert twin.kept is not seen
        assert twin.kept.stream is None
        assert any(tensor is twin.number for tensor in twin.kept.tensors)


def test_what_a_handle_keeps_is_all_its_memory(buffer: ElasticBuffer) -> None:
    """For the allocator, one tensor of each piece of memory will do."""
    handle = dispatch(buffer, do_cpu_sync=False)
    kept = {tensor.untyped_storage().data_ptr() for tensor in handle.kept.tensors}
    tensors = [value for value in vars(handle).values() if isinstance(value, torch.Tensor)]
    assert {tensor.untyped_storage().data_ptr() for tensor in tensors} == kept
    assert len(kept) == len(handle.kept.tensors) == 4
