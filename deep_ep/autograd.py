"""Dispatch and combine that carry gradients, and that torch.compile can trace.

The backward of dispatch is combine, and the backward of combine is a dispatch by the same handle. Beneath lie three
custom operators of torch, of tensors and numbers only: a buffer is a number there, and a handle what it consists of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, library

from deep_ep import plan, validate
from deep_ep.buffer import ElasticBuffer, buffer_of
from deep_ep.handle import EPHandle

Dispatched = tuple[Tensor, Tensor | None, Tensor | None, EPHandle]


def dispatch(
    buffer: ElasticBuffer,
    x: Tensor,
    topk_idx: Tensor | None = None,
    topk_weights: Tensor | None = None,
    *,
    num_experts: int | None = None,
    num_max_tokens_per_rank: int | None = None,
    expert_alignment: int | None = None,
    num_sms: int = 0,
    handle: EPHandle | None = None,
    do_cpu_sync: bool | None = None,
    do_expand: bool = False,
) -> Dispatched:
    """``buffer.dispatch`` with gradients for ``x`` and ``topk_weights``. Every rank runs the backward pass, or none.

    Two things differ from it, so that products over all rows, and their gradients, are right. Rows that hold no token
    are zeros: padding, and with ``do_cpu_sync=False`` what lies behind the last one. And in the plain layout so are the
    weights of selections that live elsewhere.

    torch.compile traces it without a graph break with ``do_cpu_sync=False``, or with a handle.

    Args:
        x: [T, H] bfloat16.
        handle: of an earlier dispatch, whose routes are taken again; all that it knows is left out then, or the same.
        do_cpu_sync: True (the default) or False, as in ``buffer.dispatch``; without a meaning beside a handle.

    Returns:
        ``(recv_x, recv_topk_idx or None, recv_topk_weights or None, handle)``

    Raises:
        As ``buffer.dispatch`` does. What torch.compile traces, the operators look at when they run.
    """
    known = {
        "num_experts": num_experts,
        "num_max_tokens_per_rank": num_max_tokens_per_rank,
        "expert_alignment": expert_alignment,
    }
    if not torch.compiler.is_compiling():
        _look_at(buffer, handle, x=x, topk_idx=topk_idx, topk_weights=topk_weights)
        num_sms = validate.is_count("num_sms", num_sms, 0)
        validate.are_flags(do_expand=do_expand, do_cpu_sync=do_cpu_sync is None or do_cpu_sync)
    if handle is None:
        exact = do_cpu_sync is None or do_cpu_sync
        if exact and torch.compiler.is_compiling():
            torch._dynamo.graph_break("the host waits for counts: deep_ep.autograd.dispatch takes do_cpu_sync=False")
        assert topk_idx is not None  # or it has been said
        numbers = [*_numbers(buffer, **known), num_sms]
        recv_x, recv_idx, weights, *found = _find(x, topk_idx, topk_weights, buffer._key, numbers, do_expand, exact)
        handle = Route.found(found, numbers, buffer.num_ranks, exact).handle(buffer, do_expand)
    else:
        validate.agrees_with_handle(handle, topk_idx, **known)
        route = Route.of(handle)
        if num_sms:
            route.numbers[-1] = num_sms
        recv_x, recv_idx, weights = _follow(
            x, topk_weights, *route, buffer._key, do_expand, _num_rows(handle, do_expand)
        )
        handle.turn_to(do_expand)
    return recv_x, None if do_expand else recv_idx, None if topk_weights is None else weights, handle


def combine(
    buffer: ElasticBuffer,
    x: Tensor,
    handle: EPHandle,
    topk_weights: Tensor | None = None,
    bias: Tensor | Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``buffer.combine`` with gradients for ``x``, ``topk_weights`` and ``bias``; of rows that hold no token they are
    zeros. torch.compile traces it without a graph break.

    Returns:
        ``(combined_x, combined_topk_weights or None)``
    """
    if not torch.compiler.is_compiling():
        if handle is None:
            raise TypeError("handle must be the EPHandle that dispatch returned, but it is a NoneType")
        _look_at(buffer, handle, x=x, topk_weights=topk_weights)
        dims, device = "XH" if handle.do_expand else "NH", handle.topk_idx.device
        validate.is_tensor("x", x, dims, torch.bfloat16, device)
        validate.biases(bias, len(handle.topk_idx), x.shape[1], device)
    biases = [] if bias is None else [bias] if isinstance(bias, Tensor) else list(bias)
    combined, weights = _combine(x, topk_weights, biases, *Route.of(handle), buffer._key, handle.do_expand)
    return combined, None if topk_weights is None else weights


def _look_at(buffer: ElasticBuffer, handle: EPHandle | None, x: Any, **tensors: Any) -> None:
    """What would be an error of torch's own is one of ours; all else the calls look at."""
    if not isinstance(buffer, ElasticBuffer):
        raise TypeError(f"buffer must be an ElasticBuffer, but it is a {type(buffer).__name__}")
    if isinstance(x, (tuple, list)):
        raise TypeError(
            "x must be one torch.Tensor of torch.bfloat16: scale factors carry no gradients; pass a pair to "
            "buffer.dispatch, under torch.no_grad() or inside a torch.autograd.Function of your own"
        )
    if handle is not None:
        buffer._end().own_handle(handle)
    elif tensors["topk_idx"] is None:
        raise ValueError("topk_idx must be given unless a handle is; pass one row of expert ids per token")
    for name, value in {"x": x, **tensors}.items():
        if not isinstance(value, Tensor) and (value is not None or name == "x"):
            raise TypeError(f"{name} must be a torch.Tensor, but it is a {type(value).__name__}")


def _numbers(
    buffer: ElasticBuffer, num_experts: Any, num_max_tokens_per_rank: Any, expert_alignment: Any
) -> tuple[int, int, int]:
    """Those of a route, from what was given for them."""
    max_tokens = buffer.num_max_tokens_per_rank if num_max_tokens_per_rank is None else num_max_tokens_per_rank
    alignment = 1 if expert_alignment is None else expert_alignment
    if torch.compiler.is_compiling():
        return num_experts, max_tokens, alignment
    return (
        validate.is_expert_count(num_experts, buffer.num_ranks),
        validate.is_max_tokens(max_tokens),
        validate.is_count("expert_alignment", alignment, 1, validate.MAX_ALIGNMENT),
    )


class Route(NamedTuple):
    """A handle as operators take it."""

    tensors: list[Tensor]  # in the order in which handle() takes them apart
    counts: list[int]  # num_recv_tokens_per_expert_list
    numbers: list[int]  # experts, tokens of a rank, alignment, SMs that were told of

    @staticmethod
    def of(handle: EPHandle) -> Route:
        tensors = [
            handle.topk_idx,
            handle.dst_buffer_slot_idx,
            handle.recv_src_metadata,
            handle.psum_num_recv_tokens_per_scaleup_rank,
            handle.per_expert_aligned,
            handle.per_expert_end,
            handle.num_unaligned_recv_tokens_per_expert,
            handle.number,
        ]
        numbers = [handle.num_experts, handle.num_max_tokens_per_rank, handle.expert_alignment, handle.told_num_sms]
        return Route(tensors, handle.num_recv_tokens_per_expert_list, numbers)

    @staticmethod
    def found(found: Sequence[Tensor], numbers: list[int], num_ranks: int, exact: bool) -> Route:
        """From what a dispatch returns behind its rows; counts are there if the host has waited for them."""
        topk_idx, slots, metadata, sums, counts = found
        local_experts = numbers[0] // num_ranks
        parts = torch.split(sums, [num_ranks, local_experts, local_experts, local_experts, 1])
        return Route([topk_idx, slots, metadata, *parts], counts.tolist() if exact else [], numbers)

    def handle(self, buffer: ElasticBuffer, do_expand: bool) -> EPHandle:
        """The handle, for this layout."""
        topk_idx, slots, metadata, per_rank, aligned, end, per_expert, number = self.tensors
        num_experts, max_tokens, alignment, told_num_sms = self.numbers
        sizes = (max_tokens, buffer.num_ranks, topk_idx.shape[1], num_experts // buffer.num_ranks, alignment)
        return EPHandle(
            do_expand=do_expand,
            num_experts=num_experts,
            expert_alignment=alignment,
            num_max_tokens_per_rank=max_tokens,
            num_sms=told_num_sms or buffer._num_sms[int(do_expand)][topk_idx.shape[1]],
            told_num_sms=told_num_sms,
            topk_idx=topk_idx,
            num_recv_tokens=metadata.shape[0],
            num_expanded_tokens=sum(self.counts) if self.counts else plan.expanded_rows_at_most(*sizes),
            num_recv_tokens_per_expert_list=list(self.counts),
            psum_num_recv_tokens_per_scaleup_rank=per_rank,
            psum_num_recv_tokens_per_expert=end if do_expand else aligned,
            num_unaligned_recv_tokens_per_expert=per_expert,
            recv_src_metadata=metadata,
            dst_buffer_slot_idx=slots,
            per_expert_aligned=aligned,
            per_expert_end=end,
            number=number,
            group_ranks=buffer._group_ranks,
            rank=buffer.rank_idx,
        )


def _num_rows(handle: EPHandle, do_expand: bool) -> int:
    return handle.num_expanded_tokens if do_expand else handle.recv_src_metadata.shape[0]


# The operators. What may be None comes out as an empty tensor.


@library.custom_op("deep_ep::dispatch", mutates_args=())
def _find(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    key: int,
    numbers: Sequence[int],
    expand: bool,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_experts, max_tokens, alignment, num_sms = numbers
    with torch.no_grad():
        recv_x, recv_idx, weights, handle, _ = buffer_of(key).dispatch(
            x,
            topk_idx,
            topk_weights,
            num_experts=num_experts,
            num_max_tokens_per_rank=max_tokens,
            expert_alignment=alignment,
            num_sms=num_sms,
            do_cpu_sync=exact,
            do_expand=expand,
            do_zero_padding=expand,
        )
        assert isinstance(recv_x, Tensor)
        _blank(recv_x, recv_idx, weights, handle)
        topk_idx, slots, metadata, *sums = Route.of(handle).tensors
        counts = torch.from_numpy(np.array(handle.num_recv_tokens_per_expert_list, dtype=np.int64))
        return *_filled(recv_x, recv_idx, weights), topk_idx, slots, metadata, torch.cat(sums), counts


@library.custom_op("deep_ep::dispatch_by_handle", mutates_args=())
def _follow(
    x: Tensor,
    topk_weights: Tensor | None,
    tensors: Sequence[Tensor],
    counts: Sequence[int],
    numbers: Sequence[int],
    key: int,
    expand: bool,
    num_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    buffer = buffer_of(key)
    handle = Route([*tensors], [*counts], [*numbers]).handle(buffer, expand)
    with torch.no_grad():
        recv_x, recv_idx, weights, _, _ = buffer.dispatch(
            x,
            topk_weights=topk_weights,
            handle=handle,
            num_sms=handle.told_num_sms,
            do_expand=expand,
            do_zero_padding=expand,
        )
        assert isinstance(recv_x, Tensor)
        _blank(recv_x, recv_idx, weights, handle)
        return _filled(recv_x, recv_idx, weights)


@library.custom_op("deep_ep::combine", mutates_args=())
def _combine(
    x: Tensor,
    topk_weights: Tensor | None,
    biases: Sequence[Tensor],
    tensors: Sequence[Tensor],
    counts: Sequence[int],
    numbers: Sequence[int],
    key: int,
    expand: bool,
) -> tuple[Tensor, Tensor]:
    buffer = buffer_of(key)
    handle = Route([*tensors], [*counts], [*numbers]).handle(buffer, expand)
    with torch.no_grad():
        combined, weights, _ = buffer.combine(x, handle, topk_weights, list(biases) or None)
        return combined, combined.new_empty(0, dtype=torch.float32) if weights is None else weights


def _blank(recv_x: Tensor, recv_idx: Tensor | None, weights: Tensor | None, handle: EPHandle) -> None:
    """Zeros where no token is, in place; between the groups of the expanded layout there are some already."""
    if weights is not None and recv_idx is not None:
        weights.masked_fill_(recv_idx < 0, 0.0)
    if handle.num_recv_tokens_per_expert_list:
        return  # all rows are used
    used_tokens = handle.psum_num_recv_tokens_per_scaleup_rank
    unused = _from(used_tokens if recv_idx is not None else handle.per_expert_aligned, len(recv_x))
    recv_x.masked_fill_(unused[:, None], 0.0)
    if weights is not None and recv_idx is None:
        weights.masked_fill_(unused, 0.0)


def _from(sums: Tensor, num_rows: int) -> Tensor:
    """Which rows lie behind the last that is counted."""
    return torch.arange(num_rows, device=sums.device) >= sums[-1]


def _filled(recv_x: Tensor, recv_idx: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    idx = recv_x.new_empty(0, dtype=torch.int64) if recv_idx is None else recv_idx
    return recv_x, idx, recv_x.new_empty(0, dtype=torch.float32) if weights is None else weights


# Their shapes, for who traces.


def _shapes(
    x: Tensor, topk_idx: Tensor, has_weights: bool, expand: bool, num_tokens: int, num_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    recv_idx = x.new_empty(0, dtype=torch.int64) if expand else topk_idx.new_empty(num_tokens, topk_idx.shape[1])
    weights: Sequence[int] = [num_rows] if expand else [num_tokens, topk_idx.shape[1]]
    return (
        x.new_empty(num_rows, x.shape[1]),
        recv_idx,
        x.new_empty(weights if has_weights else [0], dtype=torch.float32),
    )


@_find.register_fake
def _(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    key: int,
    numbers: Sequence[int],
    expand: bool,
    exact: bool,
) -> tuple[Tensor, ...]:
    num_experts, max_tokens, alignment, _ = numbers
    num_ranks, num_topk = buffer_of(key).num_ranks, topk_idx.shape[1]
    local_experts = num_experts // num_ranks
    num_tokens: Any = num_ranks * max_tokens
    num_rows: Any = num_tokens
    if exact:
        context = library.get_ctx()
        num_tokens = context.new_dynamic_size()
        num_rows = context.new_dynamic_size() if expand else num_tokens
    elif expand:
        num_rows = plan.expanded_rows_at_most(max_tokens, num_ranks, num_topk, local_experts, alignment)
    return (
        *_shapes(x, topk_idx, topk_weights is not None, expand, num_tokens, num_rows),
        torch.empty_like(topk_idx, memory_format=torch.contiguous_format),
        topk_idx.new_empty(topk_idx.shape, dtype=torch.int32),
        topk_idx.new_empty((num_tokens, num_topk + 2), dtype=torch.int32),
        topk_idx.new_empty(num_ranks + 3 * local_experts + 1, dtype=torch.int32),
        torch.empty(local_experts if exact else 0, dtype=torch.int64, device="cpu"),
    )


@_follow.register_fake
def _(
    x: Tensor,
    topk_weights: Tensor | None,
    tensors: Sequence[Tensor],
    counts: Sequence[int],
    numbers: Sequence[int],
    key: int,
    expand: bool,
    num_rows: int,
) -> tuple[Tensor, ...]:
    topk_idx, _, metadata, *_ = tensors
    return _shapes(x, topk_idx, topk_weights is not None, expand, metadata.shape[0], num_rows)


@_combine.register_fake
def _(
    x: Tensor,
    topk_weights: Tensor | None,
    biases: Sequence[Tensor],
    tensors: Sequence[Tensor],
    counts: Sequence[int],
    numbers: Sequence[int],
    key: int,
    expand: bool,
) -> tuple[Tensor, ...]:
    topk_idx = tensors[0]
    weights = [0] if topk_weights is None else topk_idx.shape
    return x.new_empty(topk_idx.shape[0], x.shape[1]), x.new_empty(weights, dtype=torch.float32)


# Their gradients. Each of them is a call that all ranks make, whatever their own inputs need.


def _remember(ctx: Any, route: Route, key: int, expand: bool, has_weights: bool) -> None:
    ctx.save_for_backward(*route.tensors)
    ctx.rest, ctx.key, ctx.expand, ctx.has_weights = route[1:], key, expand, has_weights
    ctx.num_tensors = len(route.tensors)  # saved_tensors may be unpacked only once, says torch's checkpoint


def _by_combine(ctx: Any, grad_x: Tensor, grad_weights: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradients of what a dispatch sent, from those of what it delivered."""
    given = grad_weights.contiguous() if ctx.has_weights else None
    combined, weights = _combine(
        grad_x.contiguous(), given, [], list(ctx.saved_tensors), *ctx.rest, ctx.key, ctx.expand
    )
    return combined, weights if ctx.has_weights else None


def _of_route(ctx: Any) -> tuple[Any, ...]:
    """No gradients for a route, in the form that torch wants: an empty list stands for itself."""
    counts, _ = ctx.rest
    return [None] * ctx.num_tensors, None if counts else [], None


def _find_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, topk_weights, key, numbers, expand, exact = inputs
    route = Route.found(output[3:], list(numbers), buffer_of(key).num_ranks, exact)
    _remember(ctx, route, key, expand, topk_weights is not None)


def _find_backward(ctx: Any, grad_x: Tensor, _: Any, grad_weights: Tensor, *rest: Any) -> tuple[Any, ...]:
    grad_x, grad_weights_or_none = _by_combine(ctx, grad_x, grad_weights)
    return grad_x, None, grad_weights_or_none, None, None, None, None


def _follow_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, topk_weights, tensors, counts, numbers, key, expand, _ = inputs
    _remember(ctx, Route(list(tensors), list(counts), list(numbers)), key, expand, topk_weights is not None)


def _follow_backward(ctx: Any, grad_x: Tensor, _: Any, grad_weights: Tensor) -> tuple[Any, ...]:
    grad_x, grad_weights_or_none = _by_combine(ctx, grad_x, grad_weights)
    return grad_x, grad_weights_or_none, *_of_route(ctx), None, None, None


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, topk_weights, biases, tensors, counts, numbers, key, expand = inputs
    _remember(ctx, Route(list(tensors), list(counts), list(numbers)), key, expand, topk_weights is not None)
    ctx.num_rows, ctx.num_biases = x.shape[0], len(biases)


def _combine_backward(ctx: Any, grad_x: Tensor, grad_weights: Tensor) -> tuple[Any, ...]:
    tensors, given = list(ctx.saved_tensors), grad_weights.contiguous() if ctx.has_weights else None
    grad_rows, _, weights = _follow(grad_x.contiguous(), given, tensors, *ctx.rest, ctx.key, ctx.expand, ctx.num_rows)
    grad_biases = [grad_x] * ctx.num_biases
    return grad_rows, weights if ctx.has_weights else None, grad_biases, *_of_route(ctx), None, None


library.register_autograd("deep_ep::dispatch", _find_backward, setup_context=_find_setup)
library.register_autograd("deep_ep::dispatch_by_handle", _follow_backward, setup_context=_follow_setup)
library.register_autograd("deep_ep::combine", _combine_backward, setup_context=_combine_setup)
