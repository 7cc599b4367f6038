"""One dispatch: validate -> plan -> launch -> wrap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from deep_ep import layout, plan, validate
from deep_ep.calls.endpoint import Endpoint, Half, Tensors
from deep_ep.calls.payload import Payload
from deep_ep.event import EventOverlap, Timing
from deep_ep.handle import EPHandle
from deep_ep.ops.arguments import RecordShape, Routing, Rows, pointer, set_launch_fields
from deep_ep.ops.dispatch import Counts, DispatchArgs, Layout, Padding, Places, Received, Scales, dispatch_kernel

TokensOrPair = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
DispatchResult = tuple[TokensOrPair, torch.Tensor | None, torch.Tensor | None, EPHandle, EventOverlap]


@dataclass(frozen=True)
class Asked:
    """The arguments of a dispatch as they were given; nobody has looked at them yet."""

    x: Any
    topk_idx: Any
    topk_weights: Any
    num_experts: Any
    num_max_tokens_per_rank: Any
    expert_alignment: Any
    num_sms: Any
    do_handle_copy: bool
    do_cpu_sync: bool | None
    do_expand: bool
    do_zero_padding: bool
    use_tma_aligned_col_major_sf: bool
    timing: Timing


@dataclass(frozen=True)
class DispatchRequest:
    """A dispatch whose arguments are right. T tokens of H elements, K selections each."""

    payload: Payload  # [T, H]
    topk_idx: torch.Tensor  # [T, K]
    weights: torch.Tensor | None  # [T, K]
    num_experts: int
    alignment: int
    max_tokens: int
    num_sms: int
    record: layout.Record
    exact_sizes: bool  # the host waits for the counts
    copy_topk_idx: bool
    expand: bool
    zero_padding: bool
    col_major_scales: bool
    timing: Timing


def check_dispatch(endpoint: Endpoint, asked: Asked) -> DispatchRequest:
    """Look at everything that a user may get wrong; nothing has happened yet when this raises.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    device = endpoint.device
    payload = _check_payload(asked, device)
    num_tokens = payload.rows.shape[0]
    topk_idx = validate.is_topk_idx(asked.topk_idx, num_tokens, validate.topk_idx_t, device)
    num_topk = topk_idx.shape[1]
    weights = validate.is_weights(asked.topk_weights, "topk_weights", num_tokens, num_topk, device)
    num_experts = validate.is_expert_count(asked.num_experts, endpoint.num_ranks)
    alignment = 1 if asked.expert_alignment is None else asked.expert_alignment
    alignment = validate.is_count("expert_alignment", alignment, 1, validate.MAX_ALIGNMENT)
    record = payload.record(num_topk)
    max_tokens = endpoint.fitting_tokens(asked.num_max_tokens_per_rank, num_tokens, record)
    num_sms = endpoint.num_sms(asked.num_sms)
    validate.is_timing(asked.timing)
    exact_sizes = asked.do_cpu_sync is None or asked.do_cpu_sync
    if exact_sizes:
        endpoint.refuse_capture("do_cpu_sync must be False inside a CUDA graph capture: the host cannot wait there")
    if endpoint.environment.buffer_debug:
        validate.are_valid_selections(topk_idx, num_experts)
    return DispatchRequest(
        payload=payload,
        topk_idx=topk_idx,
        weights=weights,
        num_experts=num_experts,
        alignment=alignment,
        max_tokens=max_tokens,
        num_sms=num_sms,
        record=record,
        exact_sizes=exact_sizes,
        copy_topk_idx=asked.do_handle_copy,
        expand=asked.do_expand,
        zero_padding=asked.do_zero_padding,
        col_major_scales=asked.use_tma_aligned_col_major_sf,
        timing=asked.timing,
    )


def _check_payload(asked: Asked, device: torch.device) -> Payload:
    validate.carries_no_gradient("dispatch", x=asked.x, topk_weights=asked.topk_weights)
    payload = Payload(*validate.is_payload(asked.x, device))
    if asked.use_tma_aligned_col_major_sf and payload.scales is None:
        raise ValueError(
            "use_tma_aligned_col_major_sf says how to lay out scale factors, but x has none; pass x as (x8, sf), or "
            "leave it out"
        )
    return payload


@dataclass(frozen=True)
class Sizes:
    """Rows that a dispatch fills at most."""

    tokens: int
    expanded: int  # of the expanded layout, padding included

    @staticmethod
    def exact(tokens: int, aligned_counts: list[int]) -> Sizes:
        return Sizes(tokens, sum(aligned_counts))

    @staticmethod
    def worst(request: DispatchRequest, num_ranks: int) -> Sizes:
        """Every rank sends all it may, to as many experts of this rank as a token can select."""
        num_topk, local_experts = request.topk_idx.shape[1], request.num_experts // num_ranks
        tokens = num_ranks * request.max_tokens
        padding = (request.alignment - 1) * local_experts
        return Sizes(tokens, layout.align(tokens * min(num_topk, local_experts) + padding, request.alignment))


@dataclass(frozen=True)
class Outputs:
    """What a dispatch fills: ``rows`` are tokens, or rows of the expanded layout."""

    payload: Payload  # [rows, H]
    topk_idx: torch.Tensor | None  # [tokens, K]; None in the expanded layout
    weights: torch.Tensor | None  # float32: [tokens, K], or [rows] in the expanded layout
    metadata: torch.Tensor  # [tokens, K+2] int32
    sums: torch.Tensor  # those that follow, in one piece
    per_rank: torch.Tensor  # [R] int32
    per_expert_aligned: torch.Tensor  # [L] int32
    per_expert_end: torch.Tensor  # [L] int32
    per_expert: torch.Tensor  # [L] int32

    @staticmethod
    def allocate(request: DispatchRequest, sizes: Sizes, num_ranks: int) -> Outputs:
        topk_idx, weights, expand = request.topk_idx, request.weights, request.expand
        num_topk, local_experts = topk_idx.shape[1], request.num_experts // num_ranks
        rows = sizes.expanded if expand else sizes.tokens
        sums = topk_idx.new_empty(num_ranks + 3 * local_experts, dtype=torch.int32)
        return Outputs(
            request.payload.new_empty(rows, col_major_scales=request.col_major_scales),
            None if expand else topk_idx.new_empty((rows, num_topk)),
            None if weights is None else weights.new_empty(rows if expand else (rows, num_topk)),
            topk_idx.new_empty((sizes.tokens, num_topk + 2), dtype=torch.int32),
            sums,
            *torch.split(sums, [num_ranks, local_experts, local_experts, local_experts]),
        )

    @property
    def tensors(self) -> Tensors:
        """All memory that the kernel writes."""
        return self.payload.rows, self.payload.scales, self.topk_idx, self.weights, self.metadata, self.sums

    def fill_in(self, args: DispatchArgs, request: DispatchRequest, sizes: Sizes) -> None:
        """Tell the kernel where they are."""
        args.received = Received(
            x=self.payload.rows.data_ptr(),
            stride=self.payload.row_bytes,
            topk_idx=pointer(self.topk_idx),
            weights=pointer(self.weights),
            metadata=self.metadata.data_ptr(),
            scales=Scales.of(self.payload.scales),
            rows=sizes.tokens,
            expanded_rows=sizes.expanded,
            layout=Layout.EXPANDED if request.expand else Layout.PLAIN,
            padding=Padding.ZERO if request.zero_padding else Padding.LEAVE,
        )
        counts = (self.per_rank, self.per_expert_aligned, self.per_expert_end, self.per_expert)
        args.counts = Counts(*(count.data_ptr() for count in counts))


def run_dispatch(endpoint: Endpoint, request: DispatchRequest) -> DispatchResult:
    """Plan, launch and wrap. For exact sizes, the host waits between the half that sends and the half that receives."""
    roles, num_ranks = endpoint.roles.dispatch, endpoint.num_ranks
    launch = plan.plan_dispatch(roles, request.record, request.num_experts, num_ranks, endpoint.shared_limit)
    order = endpoint.order(request.timing)
    on_comm_stream = request.timing.allocate_on_comm_stream
    with order.running():
        topk_idx = request.topk_idx.contiguous()
        copies_idx = request.copy_topk_idx and topk_idx is request.topk_idx
        kept_idx = torch.empty_like(topk_idx) if copies_idx else topk_idx
        weights = None if request.weights is None else request.weights.contiguous()
        # Slots and positions: as this rank sent them, then as it keeps them.
        places = topk_idx.new_empty((4, *topk_idx.shape), dtype=torch.int32)
    args = _arguments(endpoint, request, topk_idx, weights, places, launch)
    args.kept_idx = kept_idx.data_ptr() if copies_idx else None
    made_by_kernel = (places, kept_idx) if copies_idx else (places,)
    reads: Tensors = (request.payload.rows, request.payload.scales, topk_idx, weights)

    def run(half: Half, *writes: torch.Tensor | None) -> None:
        endpoint.launch(
            dispatch_kernel(roles),
            args,
            roles=roles,
            half=half,
            num_sms=request.num_sms,
            shared_bytes=launch.shared_bytes,
            order=order,
            reads=reads,
            writes=writes,
        )

    sizes, aligned_counts = Sizes.worst(request, num_ranks), list[int]()
    with endpoint.breaking_on_error("dispatch"):
        if request.exact_sizes:
            args.host_words = endpoint.expect_counts()
            run(Half.SEND, *made_by_kernel)
            tokens, counts = endpoint.wait_for_counts(request.num_experts // num_ranks)
            aligned_counts = [layout.align(count, request.alignment) for count in counts]
            sizes = Sizes.exact(tokens, aligned_counts)
        with order.allocation(on_comm_stream):
            outputs = Outputs.allocate(request, sizes, num_ranks)
        outputs.fill_in(args, request, sizes)
        order.wait_for(request.timing.previous_event_before_epilogue)
        run(Half.RECEIVE if request.exact_sizes else Half.BOTH, *made_by_kernel, *outputs.tensors)
    event = order.end((*reads, request.topk_idx), (topk_idx, kept_idx, weights, places, *outputs.tensors))

    handle = _handle(endpoint, request, outputs, sizes, aligned_counts, kept_idx, slots=places[0])
    return outputs.payload.as_given, outputs.topk_idx, outputs.weights, handle, event


def _arguments(
    endpoint: Endpoint,
    request: DispatchRequest,
    topk_idx: torch.Tensor,
    weights: torch.Tensor | None,
    places: torch.Tensor,
    launch: plan.LaunchPlan,
) -> DispatchArgs:
    """The kernel's arguments, but for the outputs."""
    slots, positions, kept_slots, kept_positions = (place.data_ptr() for place in places.unbind())
    args = DispatchArgs(
        window=endpoint.window_argument,
        patience=endpoint.patience_argument,
        routing=Routing.of(topk_idx, request.num_experts, endpoint.num_ranks, request.max_tokens),
        record=RecordShape.of(request.record),
        rows=Rows.of(request.payload.rows),
        weights=pointer(weights),
        scales=Scales.of(request.payload.scales),
        sent=Places(slots, positions),
        kept=Places(kept_slots, kept_positions),
        alignment=request.alignment,
        num_place_warps=plan.num_place_warps(
            endpoint.roles.dispatch, request.num_experts, endpoint.num_ranks, endpoint.shared_limit
        ),
    )
    set_launch_fields(args, launch)
    return args


def _handle(
    endpoint: Endpoint,
    request: DispatchRequest,
    outputs: Outputs,
    sizes: Sizes,
    aligned_counts: list[int],
    topk_idx: torch.Tensor,
    slots: torch.Tensor,
) -> EPHandle:
    """``aligned_counts``: empty if the host has not waited for them."""
    return EPHandle(
        do_expand=request.expand,
        num_experts=request.num_experts,
        expert_alignment=request.alignment,
        num_max_tokens_per_rank=request.max_tokens,
        num_sms=request.num_sms,
        topk_idx=topk_idx,
        num_recv_tokens=sizes.tokens,
        num_expanded_tokens=sizes.expanded,
        num_recv_tokens_per_expert_list=aligned_counts,
        psum_num_recv_tokens_per_scaleup_rank=outputs.per_rank,
        psum_num_recv_tokens_per_expert=outputs.per_expert_end if request.expand else outputs.per_expert_aligned,
        num_unaligned_recv_tokens_per_expert=outputs.per_expert,
        recv_src_metadata=outputs.metadata,
        dst_buffer_slot_idx=slots,
        group_ranks=endpoint.group_ranks,
        rank=endpoint.rank,
    )
