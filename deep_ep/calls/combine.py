"""One combine: validate -> plan -> launch -> wrap."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from deep_ep import validate
from deep_ep.calls.endpoint import Endpoint, Tensors
from deep_ep.calls.plans import CombinePlan, CombineShape, plan_combine
from deep_ep.event import EventOverlap, Timing
from deep_ep.handle import EPHandle
from deep_ep.ops.arguments import InPlace, pointer
from deep_ep.ops.combine import CombineArgs, Return
from deep_ep.sm_model import Kind

KINDS = {
    Return.ROW: Kind.COMBINE,
    Return.IN_PLACE: Kind.COMBINE_IN_PLACE,
    Return.SUM: Kind.COMBINE_OF_SUMS,
    Return.EVERY_ROW: Kind.COMBINE_OF_EVERY_ROW,
}

CombineResult = tuple[torch.Tensor, torch.Tensor | None, EventOverlap]


class AskedCombine(NamedTuple):
    """The arguments of a combine as they were given; nobody has looked at them yet."""

    x: Any
    handle: Any
    topk_weights: Any
    bias: Any
    num_sms: Any
    zero_copy: Any
    timing: Timing
    allow_multiple_reduction: bool  # the buffer's


class CombineRequest(NamedTuple):
    """A combine whose arguments are right. N rows of H elements, or X expanded ones, come back as T tokens with K
    selections each."""

    x: torch.Tensor  # [N, H] or [X, H]
    handle: EPHandle
    returned: Return
    in_place: InPlace | None  # where peers read the rows
    weights: torch.Tensor | None  # [N, K] or [X]
    biases: list[torch.Tensor]  # none, one or two [T, H]
    plan: CombinePlan
    timing: Timing


def check_combine(endpoint: Endpoint, asked: AskedCombine) -> CombineRequest:
    """Look at everything that a user may get wrong; nothing has happened yet when this raises.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    device, handle = endpoint.device, endpoint.own_handle(asked.handle)
    validate.carries_no_gradient("combine", x=asked.x, topk_weights=asked.topk_weights)
    validate.are_flags(zero_copy=asked.zero_copy)
    if asked.zero_copy and handle.do_expand:
        raise ValueError(
            "zero_copy takes rows of the plain layout, but handle.do_expand is True: expanded rows are added on their "
            "rank before they travel; leave zero_copy out"
        )
    dims = "XH" if handle.do_expand else "NH"
    x = validate.is_row_matrix("x", validate.is_tensor("x", asked.x, dims, torch.bfloat16, device))
    (num_tokens, num_topk), hidden = handle.topk_idx.shape, x.shape[1]
    if handle.do_expand:
        returned = Return.SUM if asked.allow_multiple_reduction else Return.EVERY_ROW
        rows = handle.num_expanded_tokens
        validate.has_rows("x", x, rows, "the handle's expanded layout has {}; pass it whole, padding included")
        weights = validate.is_row_weights(asked.topk_weights, "topk_weights", rows, device)
    else:
        returned, rows = Return.IN_PLACE if asked.zero_copy else Return.ROW, handle.num_recv_tokens
        validate.has_rows("x", x, rows, "the handle's dispatch returned {}; pass one row for each")
        weights = validate.is_weights(asked.topk_weights, "topk_weights", rows, num_topk, device, "NK")
    in_place = endpoint.registered.place(("x", x), ("topk_weights", weights)) if asked.zero_copy else None
    biases = validate.biases(asked.bias, num_tokens, hidden, device)
    for added in biases:
        validate.carries_no_gradient("combine", bias=added)
    told = validate.is_count("num_sms", asked.num_sms, 0)
    max_tokens = validate.fitting_tokens(handle.num_max_tokens_per_rank, num_tokens)
    shape = CombineShape(
        row_bytes=hidden * x.element_size(),
        num_topk=num_topk,
        num_experts=handle.num_experts,
        max_tokens=max_tokens,
        num_sms=endpoint.num_sms(told or handle.told_num_sms, KINDS[returned], num_topk, num_tokens),
        returned=returned,
        has_weights=weights is not None,
    )
    plan = endpoint.planned(plan_combine, shape)
    validate.is_timing(asked.timing)
    return CombineRequest(x, handle, returned, in_place, weights, biases, plan, asked.timing)


def run_combine(endpoint: Endpoint, request: CombineRequest) -> CombineResult:
    """Plan, launch and wrap."""
    x, handle = request.x, request.handle
    order = endpoint.order(request.timing)
    order.wait_for(request.timing.previous_event_before_epilogue)
    weights = order.contiguous(request.weights)
    with order.allocation(request.timing.allocate_on_comm_stream):
        combined_x = x.new_empty((handle.topk_idx.shape[0], x.shape[1]))
        combined_weights = None if weights is None else weights.new_empty(handle.topk_idx.shape)

    metadata = handle.recv_src_metadata if handle.do_expand else None
    slots, per_rank = handle.dst_buffer_slot_idx, handle.psum_num_recv_tokens_per_scaleup_rank
    given = (x, request.weights, *request.biases)
    results: Tensors = (combined_x, combined_weights)
    with endpoint.breaking_on_error("combine", order):
        endpoint.launch(
            request.plan.launch,
            _arguments(request, weights, metadata, combined_x, combined_weights),
            order=order,
            reads=(x, weights, metadata, handle.topk_idx, slots, per_rank, handle.number, *request.biases),
            writes=results,
        )
        return combined_x, combined_weights, order.end(given, results, handle.kept)


def _arguments(
    request: CombineRequest,
    weights: torch.Tensor | None,
    metadata: torch.Tensor | None,
    combined_x: torch.Tensor,
    combined_weights: torch.Tensor | None,
) -> CombineArgs:
    """The plan's arguments, with what is this call's own."""
    handle, args = request.handle, CombineArgs.from_buffer_copy(request.plan.args)
    args.routing.take(handle.topk_idx)
    args.slots = handle.dst_buffer_slot_idx.data_ptr()
    args.routes = handle.number.data_ptr()
    if request.in_place is not None:
        args.in_place = request.in_place
    results, combined = args.results, args.combined
    results.rows.take(request.x)
    results.weights = pointer(weights)
    results.metadata = pointer(metadata)
    results.by_owner.per_rank = handle.psum_num_recv_tokens_per_scaleup_rank.data_ptr()
    combined.x = combined_x.data_ptr()
    combined.weights = pointer(combined_weights)
    for i, bias in enumerate(request.biases):
        combined.bias[i] = bias.data_ptr()
        combined.bias_stride[i] = bias.stride(0) * bias.element_size()
    return args
