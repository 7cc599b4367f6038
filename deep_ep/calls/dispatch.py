"""One dispatch: validate -> plan -> launch -> wrap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from deep_ep import layout, plan, validate
from deep_ep.calls.endpoint import Endpoint, Tensors
from deep_ep.calls.payload import Payload
from deep_ep.calls.received import Outputs, Routes, Sizes
from deep_ep.event import CallOrder, EventOverlap, Timing
from deep_ep.handle import EPHandle
from deep_ep.ops.arguments import PlanFlag, RecordShape, Routing, Rows, pointer
from deep_ep.ops.dispatch import DispatchArgs, Layout, Padding, PlacesFrom, Scales, dispatch_kernel

TokensOrPair = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
DispatchResult = tuple[TokensOrPair, torch.Tensor | None, torch.Tensor | None, EPHandle, EventOverlap]


@dataclass(frozen=True)
class AskedDispatch:
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
    timing: Timing


@dataclass(frozen=True)
class RoutingRequest:
    """Where tokens are to go: worked out from their selections, or known from an earlier dispatch."""

    topk_idx: torch.Tensor  # [T, K]
    num_experts: int
    alignment: int
    max_tokens: int
    handle: EPHandle | None = None


@dataclass(frozen=True)
class DispatchRequest:
    """A dispatch whose arguments are right. T tokens of H elements, K selections each."""

    payload: Payload  # [T, H]
    routing: RoutingRequest
    weights: torch.Tensor | None  # [T, K]
    stats: torch.Tensor | None  # [L] int32, to be added to
    num_sms: int
    record: layout.Record
    exact_sizes: bool  # the host waits for the counts
    copy_topk_idx: bool
    expand: bool
    zero_padding: bool
    col_major_scales: bool
    timing: Timing

    @property
    def places_from(self) -> PlacesFrom:
        return PlacesFrom.SELECTIONS if self.routing.handle is None else PlacesFrom.HANDLE

    @property
    def plan_flags(self) -> PlanFlag:
        """What every rank must say alike."""
        flags = PlanFlag(0)
        if self.weights is not None:
            flags |= PlanFlag.WEIGHTS
        if self.payload.scales is not None:
            flags |= PlanFlag.SCALES
        if self.routing.handle is not None:
            flags |= PlanFlag.CACHED
        return flags


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
    )
    payload = _check_payload(asked, endpoint.device)
    num_tokens = payload.rows.shape[0]
    check_routing = _check_new_routing if asked.handle is None else _check_known_routing
    routing = check_routing(endpoint, asked, num_tokens)
    num_topk = routing.topk_idx.shape[1]
    weights = validate.is_weights(asked.topk_weights, "topk_weights", num_tokens, num_topk, endpoint.device)
    record = payload.record(num_topk)
    endpoint.fitting_tokens(routing.max_tokens, num_tokens, record)
    num_sms = endpoint.num_sms(asked.num_sms)
    exact_sizes = asked.handle is None and (asked.do_cpu_sync is None or asked.do_cpu_sync)
    if exact_sizes:
        endpoint.refuse_capture("do_cpu_sync must be False inside a CUDA graph capture: the host cannot wait there")
    return DispatchRequest(
        payload=payload,
        routing=routing,
        weights=weights,
        stats=validate.is_stats(asked.stats, routing.num_experts // endpoint.num_ranks, endpoint.device),
        num_sms=num_sms,
        record=record,
        exact_sizes=exact_sizes,
        copy_topk_idx=asked.do_handle_copy,
        expand=asked.do_expand,
        zero_padding=asked.do_zero_padding,
        col_major_scales=asked.use_tma_aligned_col_major_sf,
        timing=asked.timing,
    )


def _check_new_routing(endpoint: Endpoint, asked: AskedDispatch, num_tokens: int) -> RoutingRequest:
    topk_idx = validate.is_topk_idx(asked.topk_idx, num_tokens, validate.topk_idx_t, endpoint.device)
    num_experts = validate.is_expert_count(asked.num_experts, endpoint.num_ranks)
    alignment = 1 if asked.expert_alignment is None else asked.expert_alignment
    validate.is_count("expert_alignment", alignment, 1, validate.MAX_ALIGNMENT)
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


@dataclass(frozen=True)
class Call:
    """A dispatch under way: what its launches have in common."""

    endpoint: Endpoint
    request: DispatchRequest
    launch_plan: plan.LaunchPlan
    order: CallOrder
    weights: torch.Tensor | None  # [T, K], contiguous
    args: DispatchArgs

    @staticmethod
    def begin(endpoint: Endpoint, request: DispatchRequest) -> Call:
        roles, num_ranks, limit = endpoint.roles.dispatch, endpoint.num_ranks, endpoint.shared_limit
        num_experts = request.routing.num_experts
        launch = plan.plan_dispatch(roles, request.record, num_experts, num_ranks, limit)
        order = endpoint.order(request.timing)
        with order.running():
            weights = None if request.weights is None else request.weights.contiguous()
        args = DispatchArgs(
            window=endpoint.window_argument,
            patience=endpoint.patience_argument,
            record=RecordShape.of(request.record),
            rows=Rows.of(request.payload.rows),
            weights=pointer(weights),
            scales=Scales.of(request.payload.scales),
            stats=pointer(request.stats),
            alignment=request.routing.alignment,
            plan_flags=request.plan_flags,
            num_count_warps=plan.num_count_warps(roles, num_experts, num_ranks, limit),
            send_piece_bytes=launch.send.piece_bytes,
            send_stage_bytes=launch.send.stage_bytes,
            receive_piece_bytes=launch.receive.piece_bytes,
            receive_stage_bytes=launch.receive.stage_bytes,
            tables_bytes=launch.tables_bytes,
        )
        return Call(endpoint, request, launch, order, weights, args)

    def route(self, topk_idx: torch.Tensor) -> None:
        """Tell the kernel which experts tokens select."""
        routing = self.request.routing
        self.args.routing = Routing.of(topk_idx, routing.num_experts, self.endpoint.num_ranks, routing.max_tokens)

    def allocate(self, sizes: Sizes) -> Outputs:
        """Outputs, of which the kernel knows then."""
        request = self.request
        with self.order.allocation(request.timing.allocate_on_comm_stream):
            outputs = Outputs.allocate(
                request.payload,
                request.routing.topk_idx,
                request.weights,
                sizes,
                expand=request.expand,
                col_major_scales=request.col_major_scales,
            )
        layout = Layout.EXPANDED if request.expand else Layout.PLAIN
        self.args.received = outputs.argument(sizes, layout, Padding.ZERO if request.zero_padding else Padding.LEAVE)
        return outputs

    def launches(self) -> tuple[list[plan.Division], list[plan.Division]]:
        """How blocks are divided: in the launches of a call whose outputs are there, which is one if there are blocks
        for both halves; and in those of one that has to wait for them, one for each half."""
        endpoint, request = self.endpoint, self.request
        num_tokens, num_topk = request.routing.topk_idx.shape
        traffic = plan.Traffic.of(endpoint.num_ranks, num_topk, request.expand)
        roles, num_blocks = endpoint.roles.dispatch, endpoint.num_blocks(request.num_sms)
        halves = roles.halves(num_blocks, num_tokens, traffic)
        return [roles.division(num_blocks, num_tokens, traffic)] if num_blocks > 1 else halves, halves

    def launch(self, divisions: list[plan.Division], reads: Tensors, writes: Tensors) -> None:
        """``reads``: beside what every launch reads."""
        roles, payload = self.endpoint.roles.dispatch, self.request.payload
        self.endpoint.launch(
            dispatch_kernel(roles, self.request.places_from),
            self.args,
            divisions,
            num_sms=self.request.num_sms,
            shared_bytes=self.launch_plan.shared_bytes,
            order=self.order,
            reads=(payload.rows, payload.scales, self.weights, *reads),
            writes=(self.request.stats, *writes),
        )

    def end(self, inputs: Tensors, outputs: Tensors) -> EventOverlap:
        """``inputs``, ``outputs``: beside those of every dispatch."""
        request, payload = self.request, self.request.payload
        given = (payload.rows, payload.scales, request.weights, request.stats)
        return self.order.end((*given, *inputs), (self.weights, *outputs))


def run_dispatch(endpoint: Endpoint, request: DispatchRequest) -> DispatchResult:
    """Plan, launch and wrap."""
    call = Call.begin(endpoint, request)
    handle = request.routing.handle
    return _find_routes(call) if handle is None else _follow_routes(call, handle)


def _find_routes(call: Call) -> DispatchResult:
    """For exact sizes, the host waits between the half that sends and the half that receives."""
    endpoint, request, order, args = call.endpoint, call.request, call.order, call.args
    routing, num_ranks = request.routing, endpoint.num_ranks
    num_topk, local_experts = routing.topk_idx.shape[1], routing.num_experts // num_ranks
    with order.running():
        topk_idx = routing.topk_idx.contiguous()
        copies_idx = request.copy_topk_idx and topk_idx is routing.topk_idx
        kept_idx = torch.empty_like(topk_idx) if copies_idx else topk_idx
        slots = topk_idx.new_empty(topk_idx.shape, dtype=torch.int32)
    call.route(topk_idx)
    args.slots = pointer(slots)
    args.kept_idx = pointer(kept_idx) if copies_idx else None
    found = [slots, kept_idx] if copies_idx else [slots]
    whole, (sending, receiving) = call.launches()

    sizes = Sizes.worst(routing.max_tokens, num_ranks, num_topk, local_experts, routing.alignment)
    aligned_counts: list[int] = []
    with endpoint.breaking_on_error("dispatch"):
        if request.exact_sizes:
            args.host_words = endpoint.expect_counts()
            call.launch([sending], [topk_idx], found)
            tokens, counts = endpoint.wait_for_counts(local_experts)
            aligned_counts = [layout.align(count, routing.alignment) for count in counts]
            sizes = Sizes(tokens, sum(aligned_counts))
        outputs = call.allocate(sizes)
        with order.allocation(request.timing.allocate_on_comm_stream):
            routes = Routes.allocate(topk_idx, sizes.tokens, num_topk, num_ranks, local_experts)
        args.received.metadata = pointer(routes.metadata)
        args.counts = routes.argument()
        order.wait_for(request.timing.previous_event_before_epilogue)
        call.launch(
            [receiving] if request.exact_sizes else whole, [topk_idx], [*found, *outputs.tensors, *routes.tensors]
        )
    event = call.end([routing.topk_idx], [topk_idx, kept_idx, slots, *outputs.tensors, *routes.tensors])

    handle = EPHandle(
        do_expand=request.expand,
        num_experts=routing.num_experts,
        expert_alignment=routing.alignment,
        num_max_tokens_per_rank=routing.max_tokens,
        num_sms=request.num_sms,
        topk_idx=kept_idx,
        num_recv_tokens=sizes.tokens,
        num_expanded_tokens=sizes.expanded,
        num_recv_tokens_per_expert_list=aligned_counts,
        psum_num_recv_tokens_per_scaleup_rank=routes.per_rank,
        psum_num_recv_tokens_per_expert=routes.per_expert_end if request.expand else routes.per_expert_aligned,
        num_unaligned_recv_tokens_per_expert=routes.per_expert,
        recv_src_metadata=routes.metadata,
        dst_buffer_slot_idx=slots,
        per_expert_aligned=routes.per_expert_aligned,
        per_expert_end=routes.per_expert_end,
        number=routes.number,
        group_ranks=endpoint.group_ranks,
        rank=endpoint.rank,
    )
    return outputs.payload.as_given, outputs.topk_idx, outputs.weights, handle, event


def _follow_routes(call: Call, handle: EPHandle) -> DispatchResult:
    """All is known: no counts travel and the host waits for nothing."""
    endpoint, args, routes = call.endpoint, call.args, Routes.of(handle)
    slots = handle.dst_buffer_slot_idx
    call.route(handle.topk_idx)
    args.slots = pointer(slots)
    reads = [handle.topk_idx, slots, *routes.tensors]
    with endpoint.breaking_on_error("dispatch"):
        outputs = call.allocate(Sizes(handle.num_recv_tokens, handle.num_expanded_tokens))
        args.received.known_metadata = pointer(routes.metadata)
        args.counts = routes.argument()
        call.order.wait_for(call.request.timing.previous_event_before_epilogue)
        call.launch(call.launches()[0], reads, outputs.tensors)
    event = call.end(reads, outputs.tensors)
    handle.turn_to(call.request.expand)
    return outputs.payload.as_given, outputs.topk_idx, outputs.weights, handle, event
