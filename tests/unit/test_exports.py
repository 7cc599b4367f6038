"""The public names, arguments and defaults: a contract with the frameworks that call them already."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import deep_ep
import deep_ep.utils
from deep_ep import ElasticBuffer, autograd
from deep_ep.later import STATIC
from tests.unit.fake_machine import dispatch

REQUIRED = inspect.Parameter.empty

CONSTRUCTOR = {
    "group": REQUIRED,
    "num_bytes": None,
    "num_cpu_bytes": 0,
    "num_max_tokens_per_rank": 0,
    "hidden": 0,
    "num_topk": 0,
    "use_fp8_dispatch": False,
    "deterministic": False,
    "allow_hybrid_mode": True,
    "allow_multiple_reduction": True,
    "prefer_overlap_with_compute": True,
    "sl_idx": 3,
    "num_allocated_qps": 0,
    "num_cpu_timeout_secs": 300,
    "num_gpu_timeout_secs": 100,
    "explicitly_destroy": False,
    "num_registered_bytes": 0,
}
DISPATCH = {
    "x": REQUIRED,
    "topk_idx": None,
    "topk_weights": None,
    "cumulative_local_expert_recv_stats": None,
    "num_experts": None,
    "num_max_tokens_per_rank": None,
    "expert_alignment": None,
    "num_sms": 0,
    "num_qps": 0,
    "previous_event": None,
    "previous_event_before_epilogue": None,
    "async_with_compute_stream": False,
    "allocate_on_comm_stream": False,
    "handle": None,
    "do_handle_copy": True,
    "do_cpu_sync": None,
    "do_expand": False,
    "do_zero_padding": False,
    "use_tma_aligned_col_major_sf": False,
    "zero_copy": False,
}
COMBINE = {
    "x": REQUIRED,
    "handle": REQUIRED,
    "topk_weights": None,
    "bias": None,
    "num_sms": 0,
    "num_qps": 0,
    "previous_event": None,
    "previous_event_before_epilogue": None,
    "async_with_compute_stream": False,
    "allocate_on_comm_stream": False,
    "zero_copy": False,
}
SIZE_HINT = {
    "group": REQUIRED,
    "num_max_tokens_per_rank": REQUIRED,
    "hidden": REQUIRED,
    "num_topk": 0,
    "use_fp8_dispatch": False,
    "allow_hybrid_mode": True,
    "allow_multiple_reduction": True,
}
NUM_SMS = {
    "num_experts": REQUIRED,
    "num_topk": REQUIRED,
    "num_scaleout_topk": 0,
    "rdma_gbs": 0,
    "nvlink_gbs": 0,
    "sm_read_gbs": 200,
    "sm_write_gbs": 50,
}


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (ElasticBuffer, CONSTRUCTOR),
        (ElasticBuffer.dispatch, DISPATCH),
        (ElasticBuffer.combine, COMBINE),
        (ElasticBuffer.barrier, {"use_comm_stream": True, "with_cpu_sync": False, "sequential": True}),
        (ElasticBuffer.get_buffer_size_hint, SIZE_HINT),
        (ElasticBuffer.capture, {}),
        (ElasticBuffer.get_comm_stream, {}),
        (ElasticBuffer.get_physical_domain_size, {}),
        (ElasticBuffer.get_logical_domain_size, {}),
        (ElasticBuffer.get_theoretical_num_sms, NUM_SMS),
        (ElasticBuffer.get_theoretical_num_qps, {"num_sms": REQUIRED}),
        (ElasticBuffer.destroy, {}),
        (deep_ep.get_physical_domain_size, {"group": REQUIRED}),
        (deep_ep.get_logical_domain_size, {"group": REQUIRED, "allow_hybrid_mode": True}),
        (deep_ep.EventOverlap, {"event": None, "extra_tensors": None}),
        (deep_ep.EventOverlap.current_stream_wait, {"release_handle": False}),
        (deep_ep.EventOverlap.register_hook_after_wait, {"fn": REQUIRED}),
        (deep_ep.EventHandle, {}),
        (deep_ep.EventHandle.current_stream_wait, {}),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_arguments_and_defaults(function: Callable[..., Any], expected: dict[str, Any]) -> None:
    """Names, order and defaults; all can be given by place or by name."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    assert [(p.name, p.default) for p in parameters] == list(expected.items())
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters)


@pytest.mark.parametrize("name", ["get_buffer_size_hint", "capture"])
def test_static(name: str) -> None:
    assert isinstance(inspect.getattr_static(ElasticBuffer, name), staticmethod)


def test_exports() -> None:
    assert set(deep_ep.__all__) == {
        "precompile",
        "ElasticBuffer",
        "EPHandle",
        "EventOverlap",
        "EventHandle",
        "topk_idx_t",
        "get_physical_domain_size",
        "get_logical_domain_size",
        "__version__",
        # Ours, beside the contract.
        "EPError",
        "EPCompileError",
        "EPEnvironmentError",
        "EPTimeoutError",
        "EPTopologyError",
    }
    for name in deep_ep.__all__:
        assert getattr(deep_ep, name) is not None
    assert deep_ep.topk_idx_t in (torch.int64, torch.int32)


def test_the_old_place_of_the_events() -> None:
    """Megatron imports them from deep_ep.utils; one that fails silently turns the whole library off there."""
    assert deep_ep.utils.EventHandle is deep_ep.EventHandle
    assert deep_ep.utils.EventOverlap is deep_ep.EventOverlap


def test_handle_attributes() -> None:
    """What callers read from a handle; only do_expand may be set."""
    fields = deep_ep.EPHandle.__dataclass_fields__
    assert {
        "do_expand",
        "num_experts",
        "expert_alignment",
        "num_max_tokens_per_rank",
        "num_sms",
        "topk_idx",
        "num_recv_tokens",
        "num_expanded_tokens",
        "num_recv_tokens_per_expert_list",
        "psum_num_recv_tokens_per_scaleup_rank",
        "psum_num_recv_tokens_per_expert",
        "num_unaligned_recv_tokens_per_expert",
        "recv_src_metadata",
        "dst_buffer_slot_idx",
    } <= set(fields)


def test_of_a_handle_only_do_expand_may_be_set(buffer: ElasticBuffer) -> None:
    handle = dispatch(buffer, do_cpu_sync=False)
    ends = handle.psum_num_recv_tokens_per_expert
    handle.do_expand = True
    assert handle.psum_num_recv_tokens_per_expert is ends, "it belongs to the dispatch"
    for name in handle.__dataclass_fields__.keys() - {"do_expand"}:
        before = getattr(handle, name)
        with pytest.raises(AttributeError, match=f"{name} of an EPHandle cannot be set"):
            setattr(handle, name, None)
        assert getattr(handle, name) is before
    handle.turn_to(True)
    assert handle.psum_num_recv_tokens_per_expert is handle.per_expert_end


def test_a_handle_is_whole(buffer: ElasticBuffer) -> None:
    """Its constructor takes what it is given; whoever makes one gives all."""
    handle = dispatch(buffer, do_cpu_sync=False)
    assert vars(handle).keys() == handle.__dataclass_fields__.keys()
    route = autograd.Route.of(handle).handle(buffer, do_expand=False)
    assert vars(route).keys() == handle.__dataclass_fields__.keys()


@pytest.mark.parametrize("name", STATIC)
def test_hints_that_are_not_there_yet(name: str) -> None:
    """As static methods, which need no buffer."""
    with pytest.raises(NotImplementedError, match=rf"ElasticBuffer\.{name} is not there yet; README"):
        getattr(ElasticBuffer, name)(1, hidden=2)


@pytest.mark.parametrize("name", ["engram_write", "pp_send", "create_agrs_session", "agrs_set_config", "all_gather"])
def test_methods_that_are_not_there_yet(buffer: ElasticBuffer, name: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"ElasticBuffer\.{name} is not there yet; README"):
        getattr(buffer, name)(torch.zeros(1), num_sms=4)


def test_what_nobody_has_is_no_attribute(buffer: ElasticBuffer) -> None:
    assert not hasattr(buffer, "low_latency_dispatch")
    with pytest.raises(AttributeError, match="'ElasticBuffer' object has no attribute 'dispatsch'"):
        buffer.dispatsch  # noqa: B018
