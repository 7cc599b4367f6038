"""One combine: validate -> plan -> launch -> wrap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from deep_ep import layout, plan, validate
from deep_ep.calls.endpoint import Endpoint, Tensors
from deep_ep.event import EventOverlap, Timing
from deep_ep.handle import EPHandle
from deep_ep.ops.arguments import PlanFlag, RecordShape, Routing, Rows, pointer
from deep_ep.ops.combine import CombineArgs, Combined, Results, Return, RowsByOwner, combine_kernel, combine_roles

CombineResult = tuple[torch.Tensor, torch.Tensor | None, EventOverlap]


@dataclass(frozen=True)
class AskedCombine:
    """The arguments of a combine as they were given; nobody has looked at them yet."""

    x: Any
    handle: Any
    topk_weights: Any
    bias: Any
    num_sms: Any
    timing: Timing
    allow_multiple_reduction: bool  # the buffer's


@dataclass(frozen=True)
class CombineRequest:
    """A combine whose arguments are right. N rows of H elements, or X expanded ones, come back as T tokens with K
    selections each."""

    x: torch.Tensor  # [N, H] or [X, H]
    handle: EPHandle
    returned: Return
    weights: torch.Tensor | None  # [N, K] or [X]
    biases: list[torch.Tensor]  # none, one or two [T, H]
    max_tokens: int
    num_sms: int
    record: layout.Record
    timing: Timing

    @property
    def tokens_shape(self) -> tuple[int, int]:
        """(T, H)"""
        return self.handle.topk_idx.shape[0], self.x.shape[1]


def check_combine(endpoint: Endpoint, asked: AskedCombine) -> CombineRequest:
    """Look at everything that a user may get wrong; nothing has happened yet when this raises.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    device, handle = endpoint.device, endpoint.own_handle(asked.handle)
    validate.carries_no_gradient("combine", x=asked.x, topk_weights=asked.topk_weights)
    dims = "XH" if handle.do_expand else "NH"
    x = validate.is_row_matrix("x", validate.is_tensor("x", asked.x, dims, torch.bfloat16, device))
    num_tokens, num_topk, hidden = handle.topk_idx.shape[0], handle.num_topk, x.shape[1]
    if handle.do_expand:
        returned = Return.SUM if asked.allow_multiple_reduction else Return.EVERY_ROW
        rows = handle.num_expanded_tokens
        validate.has_rows("x", x, rows, f"the handle's expanded layout has {rows}; pass it whole, padding included")
        weights = validate.is_row_weights(asked.topk_weights, "topk_weights", rows, device)
    else:
        returned, rows = Return.ROW, handle.num_recv_tokens
        validate.has_rows("x", x, rows, f"the handle's dispatch returned {rows}; pass one row for each")
        weights = validate.is_weights(asked.topk_weights, "topk_weights", rows, num_topk, device, "NK")
    biases = validate.biases(asked.bias, num_tokens, hidden, device)
    for added in biases:
        validate.carries_no_gradient("combine", bias=added)
    rows_of_token = num_topk if returned is Return.EVERY_ROW else None
    record = layout.Record.of_combine(hidden * x.element_size(), 1 if rows_of_token else num_topk)
    max_tokens = endpoint.fitting_tokens(handle.num_max_tokens_per_rank, num_tokens, record, rows_of_token)
    num_sms = endpoint.num_sms(asked.num_sms or handle.num_sms)
    validate.is_timing(asked.timing)
    return CombineRequest(x, handle, returned, weights, biases, max_tokens, num_sms, record, asked.timing)


def run_combine(endpoint: Endpoint, request: CombineRequest) -> CombineResult:
    """Plan, launch and wrap."""
    roles, handle = combine_roles(endpoint.roles, request.returned), request.handle
    ring = plan.plan_combine(roles, request.record, endpoint.shared_limit)
    order = endpoint.order(request.timing)
    order.wait_for(request.timing.previous_event_before_epilogue)
    with order.running():
        weights = None if request.weights is None else request.weights.contiguous()
    with order.allocation(request.timing.allocate_on_comm_stream):
        combined_x = request.x.new_empty(request.tokens_shape)
        combined_weights = None if request.weights is None else request.weights.new_empty(handle.topk_idx.shape)
    metadata = None if request.returned is Return.ROW else handle.recv_src_metadata

    args = _arguments(endpoint, request, ring, weights, metadata, combined_x, combined_weights)
    slots, per_rank = handle.dst_buffer_slot_idx, handle.psum_num_recv_tokens_per_scaleup_rank
    reads: Tensors = (request.x, weights, metadata, handle.topk_idx, slots, per_rank, handle.number, *request.biases)
    writes: Tensors = (combined_x, combined_weights)
    with endpoint.breaking_on_error("combine"):
        endpoint.launch(
            combine_kernel(endpoint.roles, request.returned),
            args,
            [plan.CombineDivision(roles.num_send_blocks(endpoint.num_blocks(request.num_sms)))],
            num_sms=request.num_sms,
            shared_bytes=plan.mailboxes_bytes(roles.send) + ring.rings_bytes,
            order=order,
            reads=reads,
            writes=writes,
        )
    return combined_x, combined_weights, order.end(reads, (weights, *writes))


def _arguments(
    endpoint: Endpoint,
    request: CombineRequest,
    ring: plan.Ring,
    weights: torch.Tensor | None,
    metadata: torch.Tensor | None,
    combined_x: torch.Tensor,
    combined_weights: torch.Tensor | None,
) -> CombineArgs:
    """The kernel's arguments, but for the number of sending blocks."""
    handle = request.handle
    plan_flags = PlanFlag.WEIGHTS if weights is not None else PlanFlag(0)
    if request.returned is Return.EVERY_ROW:
        plan_flags |= PlanFlag.EVERY_ROW
    stride = combined_x.shape[1] * combined_x.element_size()
    combined = Combined(x=combined_x.data_ptr(), stride=stride, weights=pointer(combined_weights))
    for i, bias in enumerate(request.biases):
        combined.bias[i] = bias.data_ptr()
        combined.bias_stride[i] = bias.stride(0) * bias.element_size()
    return CombineArgs(
        window=endpoint.window_argument,
        patience=endpoint.patience_argument,
        routing=Routing.of(handle.topk_idx, handle.num_experts, endpoint.num_ranks, request.max_tokens),
        slots=handle.dst_buffer_slot_idx.data_ptr(),
        results=Results(
            rows=Rows.of(request.x),
            weights=pointer(weights),
            metadata=pointer(metadata),
            by_owner=RowsByOwner(handle.psum_num_recv_tokens_per_scaleup_rank.data_ptr()),
            record=RecordShape.of(request.record),
            num_topk=handle.num_topk,
        ),
        combined=combined,
        routes=handle.number.data_ptr(),
        plan_flags=plan_flags,
        piece_bytes=ring.piece_bytes,
        stage_bytes=ring.stage_bytes,
    )
