"""What follows from a call's shape alone: worked out once, and kept by the endpoint for all calls of that shape. With
it goes what those calls have brought."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from deep_ep import layout, plan
from deep_ep.calls.endpoint import Endpoint, Launch
from deep_ep.calls.expected import Expected
from deep_ep.calls.received import Sizes
from deep_ep.jit import Kernel
from deep_ep.ops.arguments import PlanFlag, RecordShape, Routing
from deep_ep.ops.combine import CombineArgs, Combined, Results, Return, combine_kernel, combine_roles
from deep_ep.ops.dispatch import DispatchArgs, Layout, Padding, PlacesFrom, Received, dispatch_kernel


class DispatchShape(NamedTuple):
    """All that a dispatch's plan follows from."""

    num_tokens: int  # rounded up to what one block counts: so a plan serves batches of almost any size
    row_bytes: int
    num_scales: int
    num_topk: int
    num_experts: int
    max_tokens: int
    alignment: int
    num_sms: int
    has_weights: bool
    has_handle: bool
    expand: bool
    zero_padding: bool
    in_place: bool
    exact_sizes: bool

    @property
    def plan_flags(self) -> int:
        """What every rank must say alike."""
        said = {
            PlanFlag.WEIGHTS: self.has_weights,
            PlanFlag.CACHED: self.has_handle,
            PlanFlag.SCALES: self.num_scales > 0,
            PlanFlag.IN_PLACE: self.in_place,
            PlanFlag.CPU_SYNC: self.in_place and self.exact_sizes,
        }
        return sum(flag for flag, is_set in said.items() if is_set)


class Part(NamedTuple):
    """One launch of a dispatch."""

    launch: Launch
    division: plan.Division
    num_blocks: int  # of all launches of the dispatch, or that there would be


@dataclass(frozen=True)
class DispatchPlan:
    """How dispatches of one shape are launched."""

    whole: tuple[Part, ...]
    """The launches of a call that has room for all that may come: one, if there are blocks to send and to receive."""
    apart: tuple[Part, Part]
    """The launches of a call that has no room yet: one that sends, counts and tells the host, and one that receives."""
    together: tuple[Part, Part] | None
    """Those of one that has room for what is expected: the first receives, too, and the second only if it could not."""
    expected: Expected
    """What calls of the shape have brought so far."""
    worst: Sizes
    """What comes if every rank sends all it may."""
    args: DispatchArgs
    """To be copied: what is the same in every call is set."""


def plan_dispatch(endpoint: Endpoint, shape: DispatchShape) -> DispatchPlan:
    """
    Raises:
        ValueError: the window does not hold what such a dispatch may send.
    """
    roles, num_ranks, limit = endpoint.roles.dispatch, endpoint.num_ranks, endpoint.shared_limit
    record = layout.Record.of_dispatch(shape.row_bytes, shape.num_scales)
    endpoint.require_room(shape.max_tokens, record, num_labels=shape.num_topk)
    memory = plan.plan_dispatch(roles, record, shape.num_topk, shape.num_experts, num_ranks, limit)
    num_blocks, local_experts = endpoint.num_blocks(shape.num_sms), shape.num_experts // num_ranks
    traffic = plan.Traffic.of(num_ranks, shape.num_topk, shape.expand)
    args = DispatchArgs(
        window=endpoint.window_argument,
        patience=endpoint.patience_argument,
        routing=Routing.of(shape.num_topk, shape.num_experts, num_ranks, shape.max_tokens),
        record=RecordShape.of(record),
        received=Received(
            stride=shape.row_bytes,
            layout=Layout.EXPANDED if shape.expand else Layout.PLAIN,
            padding=Padding.ZERO if shape.zero_padding else Padding.LEAVE,
        ),
        alignment=shape.alignment,
        plan_flags=shape.plan_flags,
        num_count_warps=plan.num_count_warps(roles, shape.num_experts, num_ranks, limit),
        send_piece_bytes=memory.send.piece_bytes,
        send_stage_bytes=memory.send.stage_bytes,
        receive_piece_bytes=memory.receive.piece_bytes,
        receive_stage_bytes=memory.receive.stage_bytes,
        tables_bytes=memory.tables_bytes,
    )
    kernel = dispatch_kernel(roles, PlacesFrom.HANDLE if shape.has_handle else PlacesFrom.SELECTIONS, shape.in_place)
    divisions: tuple[plan.Division, ...] = plan.ONE_BLOCK
    if shape.in_place:
        divisions = (roles.division_in_place(num_blocks, shape.num_tokens),)
    elif num_blocks > 1:
        divisions = (roles.division(num_blocks, shape.num_tokens, traffic, shape.has_handle),)
    first, receiving = divisions[0], plan.Division.receiving(num_blocks)
    together = None
    if len(divisions) == 1 and not shape.in_place:
        together = _pair(kernel, memory.shared_bytes, first, receiving)
    worst = Sizes.worst(shape.max_tokens, num_ranks, shape.num_topk, local_experts, shape.alignment)
    return DispatchPlan(
        whole=_parts(kernel, memory.shared_bytes, divisions),
        apart=_pair(kernel, memory.shared_bytes, first.without_receivers, receiving),
        together=together,
        expected=Expected(worst),
        worst=worst,
        args=args,
    )


def _parts(kernel: Kernel, shared_bytes: int, divisions: tuple[plan.Division, ...]) -> tuple[Part, ...]:
    num_blocks = sum(each.num_blocks for each in divisions)
    return tuple(Part(Launch(kernel, each.num_blocks, shared_bytes), each, num_blocks) for each in divisions)


def _pair(kernel: Kernel, shared_bytes: int, first: plan.Division, second: plan.Division) -> tuple[Part, Part]:
    one, other = _parts(kernel, shared_bytes, (first, second))
    return one, other


class CombineShape(NamedTuple):
    """All that a combine's plan follows from."""

    row_bytes: int
    num_topk: int
    num_experts: int
    max_tokens: int
    num_sms: int
    returned: Return
    has_weights: bool

    @property
    def plan_flags(self) -> int:
        """What every rank must say alike."""
        ways = {Return.EVERY_ROW: PlanFlag.EVERY_ROW, Return.IN_PLACE: PlanFlag.IN_PLACE}
        return ways.get(self.returned, 0) | (PlanFlag.WEIGHTS if self.has_weights else 0)


@dataclass(frozen=True)
class CombinePlan:
    """How combines of one shape are launched."""

    launch: Launch
    args: CombineArgs
    """To be copied: what is the same in every call is set."""


def plan_combine(endpoint: Endpoint, shape: CombineShape) -> CombinePlan:
    """
    Raises:
        ValueError: the window does not hold what such a combine may send.
    """
    rows_of_token = shape.num_topk if shape.returned is Return.EVERY_ROW else None
    record = layout.Record.of_combine(shape.row_bytes, 1 if rows_of_token else shape.num_topk)
    endpoint.require_room(shape.max_tokens, record, rows_of_token)
    num_blocks = endpoint.num_blocks(shape.num_sms)
    args = CombineArgs(
        window=endpoint.window_argument,
        patience=endpoint.patience_argument,
        routing=Routing.of(shape.num_topk, shape.num_experts, endpoint.num_ranks, shape.max_tokens),
        results=Results(record=RecordShape.of(record), num_topk=shape.num_topk),
        combined=Combined(stride=shape.row_bytes),
        plan_flags=shape.plan_flags,
    )
    shared_bytes = 0
    if shape.returned is not Return.IN_PLACE:
        roles = combine_roles(endpoint.roles, shape.returned)
        ring = plan.plan_combine(roles, record, endpoint.shared_limit)
        args.num_send_blocks = roles.num_send_blocks(num_blocks)
        args.piece_bytes, args.stage_bytes = ring.piece_bytes, ring.stage_bytes
        shared_bytes = plan.mailboxes_bytes(roles.send) + ring.rings_bytes
    return CombinePlan(Launch(combine_kernel(endpoint.roles, shape.returned), num_blocks, shared_bytes), args)
