"""One dispatch: validate -> plan -> launch -> wrap."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from deep_ep import layout, validate
from deep_ep.calls.endpoint import Endpoint, Tensors
from deep_ep.calls.expected import Room
from deep_ep.calls.payload import Payload
from deep_ep.calls.plans import DispatchPlan, DispatchShape, Part, plan_dispatch
from deep_ep.calls.received import Outputs, RouteCounts, Sizes
from deep_ep.event import CallOrder, EventOverlap, Kept, Timing, is_recorded
from deep_ep.handle import EPHandle
from deep_ep.ops.arguments import InPlace, pointer
from deep_ep.ops.dispatch import COPIED, WORD_BYTES, DispatchArgs, Scales
from deep_ep.sm_model import Kind

SCALES_COPIED = COPIED // WORD_BYTES  # what the copy engine moves at least
KINDS = {  # in place, expanded
    (False, False): Kind.DISPATCH,
    (False, True): Kind.EXPANDED_DISPATCH,
    (True, False): Kind.DISPATCH_IN_PLACE,
    (True, True): Kind.EXPANDED_DISPATCH_IN_PLACE,
}

TokensOrPair = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
DispatchResult = tuple[TokensOrPair, torch.Tensor | None, torch.Tensor | None, EPHandle, EventOverlap]


class AskedDispatch(NamedTuple):
    """The arguments of a dispatch as they were given; nobody has looked at them yet."""

    x: Any
    topk_idx: Any
    topk_weights: Any
    stats: Any
    num_experts: Any
    num_max_tokens_per_rank: Any
    buffers_max_tokens: int
    expert_alignment: Any
    num_sms: Any
    handle: Any
    do_handle_copy: bool
    do_cpu_sync: bool | None
    do_expand: bool
    do_zero_padding: bool
    use_tma_aligned_col_major_sf: bool
    zero_copy: bool
    timing: Timing


class RoutingRequest(NamedTuple):
    """Where tokens are to go: worked out from their selections, or known from an earlier dispatch."""

    topk_idx: torch.Tensor  # [T, K]
    num_experts: int
    alignment: int
    max_tokens: int
    handle: EPHandle | None = None


class DispatchRequest(NamedTuple):
    """A dispatch whose arguments are right. T tokens of H elements, K selections each."""

    payload: Payload  # [T, H]
    in_place: InPlace | None  # where peers read it
    routing: RoutingRequest
    weights: torch.Tensor | None  # [T, K]
    stats: torch.Tensor | None  # [L] int32, to be added to
    num_sms: int
    told_num_sms: int  # 0: nothing
    plan: DispatchPlan
    exact_sizes: bool  # the host waits for the counts
    copy_topk_idx: bool
    expand: bool
    col_major_scales: bool
    timing: Timing


def check_dispatch(endpoint: Endpoint, asked: AskedDispatch) -> DispatchRequest:
    """Look at everything that a user may get wrong; nothing has happened yet when this raises.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    validate.is_timing(asked.timing)
    validate.are_flags(
        do_handle_copy=asked.do_handle_copy,
        do_cpu_sync=asked.do_cpu_sync is None or asked.do_cpu_sync,
        do_expand=asked.do_expand,
        do_zero_padding=asked.do_zero_padding,
        use_tma_aligned_col_major_sf=asked.use_tma_aligned_col_major_sf,
        zero_copy=asked.zero_copy,
    )
    payload = _check_payload(asked, endpoint.device)
    in_place = _check_in_place(endpoint, payload) if asked.zero_copy else None
    num_tokens = payload.rows.shape[0]
    check_routing = _check_new_routing if asked.handle is None else _check_known_routing
    routing = check_routing(endpoint, asked, num_tokens)
    num_topk = routing.topk_idx.shape[1]
    weights = validate.is_weights(asked.topk_weights, "topk_weights", num_tokens, num_topk, endpoint.device)
    expand = bool(asked.do_expand)
    exact_sizes = asked.handle is None and (asked.do_cpu_sync is None or bool(asked.do_cpu_sync))
    kind = KINDS[in_place is not None, expand]
    shape = DispatchShape(
        num_tokens=layout.align(num_tokens, endpoint.roles.dispatch.tokens_per_counter),
        row_bytes=payload.row_bytes,
        num_scales=payload.num_scales,
        num_topk=num_topk,
        num_experts=routing.num_experts,
        max_tokens=validate.fitting_tokens(routing.max_tokens, num_tokens),
        alignment=routing.alignment,
        num_sms=endpoint.num_sms(asked.num_sms, kind, num_topk, num_tokens),
        has_weights=weights is not None,
        has_handle=routing.handle is not None,
        expand=expand,
        zero_padding=bool(asked.do_zero_padding),
        in_place=in_place is not None,
        exact_sizes=exact_sizes,
    )
    planned = endpoint.planned(plan_dispatch, shape)
    if exact_sizes:
        endpoint.refuse_capture("do_cpu_sync must be False inside a CUDA graph capture: the host cannot wait there")
    return DispatchRequest(
        payload=payload,
        in_place=in_place,
        routing=routing,
        weights=weights,
        stats=validate.is_stats(asked.stats, routing.num_experts // endpoint.num_ranks, endpoint.device),
        num_sms=shape.num_sms,
        told_num_sms=shape.num_sms if asked.num_sms else 0,
        plan=planned,
        exact_sizes=exact_sizes,
        copy_topk_idx=asked.do_handle_copy,
        expand=expand,
        col_major_scales=asked.use_tma_aligned_col_major_sf,
        timing=asked.timing,
    )


def _check_new_routing(endpoint: Endpoint, asked: AskedDispatch, num_tokens: int) -> RoutingRequest:
    topk_idx = validate.is_topk_idx(asked.topk_idx, num_tokens, validate.topk_idx_t, endpoint.device)
    num_experts = validate.is_expert_count(asked.num_experts, endpoint.num_ranks)
    alignment = 1 if asked.expert_alignment is None else asked.expert_alignment
    alignment = validate.is_count("expert_alignment", alignment, 1, validate.MAX_ALIGNMENT)
    if endpoint.looks_at_selections():
        with endpoint.looking(asked.timing):
            validate.are_valid_selections(topk_idx, num_experts)
    max_tokens = asked.num_max_tokens_per_rank
    return RoutingRequest(
        topk_idx, num_experts, alignment, asked.buffers_max_tokens if max_tokens is None else max_tokens
    )


def _check_known_routing(endpoint: Endpoint, asked: AskedDispatch, num_tokens: int) -> RoutingRequest:
    handle = endpoint.own_handle(asked.handle)
    validate.agrees_with_handle(
        handle,
        asked.topk_idx,
        num_experts=asked.num_experts,
        num_max_tokens_per_rank=asked.num_max_tokens_per_rank,
        expert_alignment=asked.expert_alignment,
    )
    dispatched = handle.topk_idx.shape[0]
    if num_tokens != dispatched:
        raise ValueError(f"x has {num_tokens} tokens but the handle's dispatch had {dispatched}; pass as many")
    return RoutingRequest(
        handle.topk_idx, handle.num_experts, handle.expert_alignment, handle.num_max_tokens_per_rank, handle
    )


def _check_payload(asked: AskedDispatch, device: torch.device) -> Payload:
    validate.carries_no_gradient("dispatch", x=asked.x, topk_weights=asked.topk_weights)
    payload = Payload(*validate.is_payload(asked.x, device))
    if asked.use_tma_aligned_col_major_sf and payload.scales is None:
        raise ValueError(
            "use_tma_aligned_col_major_sf says how to lay out scale factors, but x has none; pass x as (x8, sf), or "
            "leave it out"
        )
    return payload


def _check_in_place(endpoint: Endpoint, payload: Payload) -> InPlace:
    name = "x" if payload.scales is None else "x[0]"
    in_place = endpoint.registered.place((name, payload.rows), ("x[1]", payload.scales))
    if payload.num_scales % SCALES_COPIED:
        raise ValueError(
            f"x[1] must have a multiple of {SCALES_COPIED} scale factors a token for zero_copy, but its shape is "
            f"[{payload.rows.shape[0]}, {payload.num_scales}]; pad it, or leave zero_copy out"
        )
    return in_place


@dataclass(slots=True)
class Call:
    """A dispatch under way: what its launches have in common."""

    endpoint: Endpoint
    request: DispatchRequest
    order: CallOrder
    topk_idx: torch.Tensor  # [T, K], contiguous as weights are
    weights: torch.Tensor | None
    args: DispatchArgs

    @staticmethod
    def begin(endpoint: Endpoint, request: DispatchRequest) -> Call:
        """Of the arguments, the kernel lacks then where routes and outputs are."""
        payload, order = request.payload, endpoint.order(request.timing)
        topk_idx, weights = order.contiguous(request.routing.topk_idx), order.contiguous(request.weights)
        args = DispatchArgs.from_buffer_copy(request.plan.args)
        args.routing.take(topk_idx)
        args.rows.take(payload.rows)
        args.weights = pointer(weights)
        args.stats = pointer(request.stats)
        if payload.scales is not None:
            args.scales = Scales.of(payload.scales)
        if request.in_place is not None:
            args.in_place = request.in_place
        return Call(endpoint, request, order, topk_idx, weights, args)

    def allocation(self) -> AbstractContextManager[Any]:
        """The context in which all is allocated that the kernel writes."""
        return self.order.allocation(self.request.timing.allocate_on_comm_stream)

    def allocate(self, sizes: Sizes) -> Outputs:
        """Room for what comes, of which the kernel knows then."""
        request, topk_idx, weights = self.request, self.topk_idx, self.weights
        tokens, num_topk = sizes.tokens, topk_idx.shape[1]
        rows = sizes.expanded if request.expand else tokens
        is_new = request.routing.handle is None
        with self.allocation():
            outputs = Outputs(
                request.payload.new_empty(rows, col_major_scales=request.col_major_scales),
                None if request.expand else topk_idx.new_empty((tokens, num_topk)),
                None if weights is None else weights.new_empty(rows if request.expand else (rows, num_topk)),
                topk_idx.new_empty((tokens, num_topk + 2), dtype=torch.int32) if is_new else None,
            )
        outputs.tell(self.args.received, sizes)
        return outputs

    def allocate_counts(self) -> RouteCounts:
        """Room for the counts of new routes, of which the kernel knows then."""
        num_ranks = self.endpoint.num_ranks
        with self.allocation():
            counts = RouteCounts.allocate(self.topk_idx, num_ranks, self.request.routing.num_experts // num_ranks)
        self.args.counts = counts.argument()
        return counts

    def launch(self, parts: Sequence[Part], reads: Tensors, writes: Tensors) -> None:
        """Launch all parts. ``reads``, ``writes``: beside those of every launch."""
        payload, args = self.request.payload, self.args
        for part in parts:
            division = part.division
            args.num_blocks = part.num_blocks
            args.num_send_blocks = division.num_send_blocks
            args.num_receive_blocks = division.num_receive_blocks
            args.first_count_block = division.first_count_block
            self.endpoint.launch(
                part.launch,
                args,
                order=self.order,
                reads=(payload.rows, payload.scales, self.weights, self.topk_idx, *reads),
                writes=(self.request.stats, *writes),
                meets_peers=division.num_send_blocks > 0 or self.request.in_place is not None,
            )

    def end(self, inputs: Tensors, outputs: Tensors, kept: Kept | None = None) -> EventOverlap:
        """``inputs``: beside those of every dispatch."""
        request, payload = self.request, self.request.payload
        given = (payload.rows, payload.scales, request.weights, request.stats, *inputs)
        return self.order.end(given, outputs, kept)


def run_dispatch(endpoint: Endpoint, request: DispatchRequest) -> DispatchResult:
    """Plan, launch and wrap."""
    call = Call.begin(endpoint, request)
    handle = request.routing.handle
    return _find_routes(call) if handle is None else _follow_routes(call, handle)


def _find_routes(call: Call) -> DispatchResult:
    endpoint, request, order, args, topk_idx = call.endpoint, call.request, call.order, call.args, call.topk_idx
    copies_idx = request.copy_topk_idx and topk_idx is request.routing.topk_idx
    with call.allocation():
        kept_idx = torch.empty_like(topk_idx) if copies_idx else topk_idx
        slots = torch.empty_like(topk_idx, dtype=torch.int32)
    args.slots = slots.data_ptr()
    args.kept_idx = kept_idx.data_ptr() if copies_idx else None
    found = Found(slots, kept_idx, copies_idx, call.allocate_counts())
    with endpoint.breaking_on_error("dispatch", order):
        return (_counted if request.exact_sizes else _uncounted)(call, found)


class Found(NamedTuple):
    """What a dispatch with new routes finds out about this rank's tokens, and how many come."""

    slots: torch.Tensor
    kept_idx: torch.Tensor  # the selections
    is_copied: bool  # or what was given
    counts: RouteCounts

    @property
    def tensors(self) -> Tensors:
        """Those that the kernel writes."""
        return self.slots, self.kept_idx if self.is_copied else None, *self.counts


def _uncounted(call: Call, found: Found) -> DispatchResult:
    """There is room for all that may come."""
    request, sizes = call.request, call.request.plan.worst
    call.order.wait_for(request.timing.previous_event_before_epilogue)
    outputs = call.allocate(sizes)
    call.launch(request.plan.whole, (), (*found.tensors, *outputs.tensors))
    return _wrap(call, found, outputs, _handle_of(call, found, outputs, sizes, []))


def _counted(call: Call, found: Found) -> DispatchResult:
    """For exact sizes, the host waits for the counts.

    With room for what this rank expects, all is launched at once, and tensors shrink to what has come: so the device
    does not wait for the host. Where that room does not do, or there was none, a second launch receives. Nobody can
    queue anything behind before this returns, so the handle is made before the counts are there.
    """
    endpoint, request, args = call.endpoint, call.request, call.args
    planned, routing, expand = request.plan, request.routing, request.expand
    made = _make_room(call)
    first, second = planned.apart if made is None else made.parts
    args.host_words = endpoint.host_counts.expect()
    call.launch((first,), (), (*found.tensors, *(() if made is None else made.outputs.tensors)))
    handle = None if made is None else _handle_of(call, found, made.outputs, made.room.most, [])

    told = endpoint.wait_for_counts(routing.num_experts // endpoint.num_ranks, routing.alignment)
    sizes = Sizes(told.rows, told.num_selections)
    planned.expected.note(sizes)
    if made is not None and handle is not None and made.room.holds(sizes):
        made.outputs.shrink(sizes.tokens, sizes.expanded if expand else sizes.tokens)
        handle.hold(sizes.tokens, sizes.expanded, told.selections.tolist())
        return _wrap(call, found, made.outputs, handle)
    made = handle = None  # what they had may serve at once: no stream is said to use it
    outputs = call.allocate(sizes)
    call.order.wait_for(request.timing.previous_event_before_epilogue)
    args.host_words = None
    call.launch((second,), (), (*found.tensors, *outputs.tensors))
    return _wrap(call, found, outputs, _handle_of(call, found, outputs, sizes, told.selections.tolist()))


def _wrap(call: Call, found: Found, outputs: Outputs, handle: EPHandle) -> DispatchResult:
    """The end of the call, and its results."""
    pieces = (
        found.kept_idx,
        found.slots,
        handle.recv_src_metadata,
        found.counts.per_rank,
    )  # one of each piece of memory
    event = call.end((call.request.routing.topk_idx,), (*outputs.without_metadata, *pieces))
    handle.remember(call.order.keep(pieces))
    return outputs.payload.as_given, outputs.topk_idx, outputs.weights, handle, event


def _handle_of(call: Call, found: Found, outputs: Outputs, sizes: Sizes, selections: list[int]) -> EPHandle:
    endpoint, request, counts = call.endpoint, call.request, found.counts
    routing = request.routing
    return EPHandle(
        do_expand=request.expand,
        num_experts=routing.num_experts,
        expert_alignment=routing.alignment,
        num_max_tokens_per_rank=routing.max_tokens,
        num_sms=request.num_sms,
        told_num_sms=request.told_num_sms,
        topk_idx=found.kept_idx,
        num_recv_tokens=sizes.tokens,
        num_expanded_tokens=sizes.expanded,
        num_recv_tokens_per_expert_list=selections,
        psum_num_recv_tokens_per_scaleup_rank=counts.per_rank,
        psum_num_recv_tokens_per_expert=counts.per_expert_end if request.expand else counts.per_expert_aligned,
        num_unaligned_recv_tokens_per_expert=counts.per_expert,
        recv_src_metadata=outputs.metadata,
        dst_buffer_slot_idx=found.slots,
        per_expert_aligned=counts.per_expert_aligned,
        per_expert_end=counts.per_expert_end,
        number=counts.number,
        group_ranks=endpoint.group_ranks,
        rank=endpoint.rank,
    )


class Made(NamedTuple):
    """Memory for what is expected."""

    room: Room
    outputs: Outputs
    parts: tuple[Part, Part]  # what is launched at once, and behind it if the room does not do


def _make_room(call: Call) -> Made | None:
    """If anything is expected, and may be written at once. The kernel knows of it then."""
    request, parts = call.request, call.request.plan.together
    if parts is None or is_recorded(request.timing.previous_event_before_epilogue):
        return None
    if request.col_major_scales:  # the number of rows decides where its columns lie
        return None
    room = request.plan.expected.room(request.expand)
    if room is None:
        return None
    try:
        made = Made(room, call.allocate(room.most), parts)
    except torch.OutOfMemoryError:  # for what really comes there may be enough
        return None
    call.args.least.rows, call.args.least.expanded_rows = room.least
    return made


def _follow_routes(call: Call, handle: EPHandle) -> DispatchResult:
    """All is known: no counts travel and the host waits for nothing."""
    request, args, counts = call.request, call.args, RouteCounts.of(handle)
    args.slots = handle.dst_buffer_slot_idx.data_ptr()
    with call.endpoint.breaking_on_error("dispatch", call.order):
        sizes = Sizes(handle.num_recv_tokens, handle.num_expanded_tokens)
        outputs = call.allocate(sizes)
        args.received.known_metadata = handle.recv_src_metadata.data_ptr()
        args.counts = counts.argument()
        call.order.wait_for(request.timing.previous_event_before_epilogue)
        known = (handle.dst_buffer_slot_idx, handle.recv_src_metadata, *counts)
        call.launch(request.plan.whole, known, outputs.without_metadata)
        event = call.end((), outputs.without_metadata, handle.kept)
    handle.turn_to(request.expand)
    return outputs.payload.as_given, outputs.topk_idx, outputs.weights, handle, event
