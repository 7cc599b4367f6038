"""What a call may look like.

Every check is made before anything is launched, and every message names the argument, what was expected, what came and
what to do.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence
from typing import Any

import torch

from deep_ep.environment import NUM_TOPK_IDX_BITS
from deep_ep.event import EventHandle, EventOverlap, Timing
from deep_ep.handle import EPHandle
from deep_ep.layout import MAX_EXPERTS, MAX_SCALES, MAX_TOKENS, MAX_TOPK
from deep_ep.plan import expanded_rows_at_most

MAX_ALIGNMENT = 1 << 16  # rows; aligned counts of all experts stay far inside 32 bits
MAX_SERVICE_LEVEL = 15  # of InfiniBand
ROW_ELEMENTS = 8  # of bfloat16, whose rows are multiples of 16 bytes
YEAR = 365 * 24 * 3600  # seconds
SLOWEST_GBS, FASTEST_GBS = 0.001, 1_000_000
LARGEST = 2**63 - 1  # what torch takes for an int

# Fixed at import; a malformed value is reported when a buffer is built.
topk_idx_t = torch.int32 if NUM_TOPK_IDX_BITS == 32 else torch.int64


def is_tensor(name: str, value: Any, dims: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of this dtype, on this device, with as many dimensions as ``dims`` has letters ("TH")."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor [{', '.join(dims)}] of {dtype}, but it is a {type(value).__name__}"
        )
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, but it is {value.dtype}; convert it with .to({dtype})")
    if value.dim() != len(dims):
        raise ValueError(f"{name} must be [{', '.join(dims)}], but its shape is {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, where this buffer's kernels run, but it is on {value.device}")
    return value


def is_payload(x: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The rows of a dispatch, [T, H], and their scale factors, [T, P] or None: x is one tensor or a pair."""
    if not isinstance(x, (tuple, list)):
        if isinstance(x, torch.Tensor) and x.dtype == torch.float8_e4m3fn:
            raise TypeError("x is torch.float8_e4m3fn and has no scale factors; pass x as (x8, sf)")
        return is_row_matrix("x", is_tensor("x", x, "TH", torch.bfloat16, device)), None
    if len(x) != 2:
        raise ValueError(f"x must be a tensor or a pair (x8, sf), but it has {len(x)} elements")
    if isinstance(x[0], torch.Tensor) and x[0].dtype != torch.float8_e4m3fn:
        raise TypeError(
            f"x[0] must be torch.float8_e4m3fn, but it is {x[0].dtype}; deep_ep.utils.per_token_cast_to_fp8(x) makes "
            "both from torch.bfloat16"
        )
    rows = is_row_matrix("x[0]", is_tensor("x[0]", x[0], "TH", torch.float8_e4m3fn, device))
    kind = x[1].dtype if isinstance(x[1], torch.Tensor) else torch.float32
    if kind not in (torch.float32, torch.int32):
        raise TypeError(f"x[1] must be torch.float32 or torch.int32, but it is {kind}; an int32 packs four UE8M0 bytes")
    scales = is_tensor("x[1]", x[1], "TP", kind, device)
    has_rows("x[1]", scales, rows.shape[0], "x[0] has {}; pass one row of scale factors per token")
    if not 1 <= scales.shape[1] <= MAX_SCALES:
        raise ValueError(
            f"x[1] must have 1 to {MAX_SCALES} scale factors a token (one for every 128 values, or four packed into "
            f"an int32), but its shape is {list(scales.shape)}"
        )
    return rows, scales


def has_rows(name: str, value: torch.Tensor, rows: int, why: str) -> None:
    """Its first dimension is ``rows``, which stands in ``why`` for ``{}``."""
    if value.shape[0] != rows:
        raise ValueError(f"{name} has {value.shape[0]} rows but {why.format(rows)}")


def is_row_matrix(name: str, value: torch.Tensor) -> torch.Tensor:
    """Rows that bulk copies can take: contiguous, and sizes, strides and address multiples of 16 bytes."""
    (rows, columns), (row_stride, stride), size = value.shape, value.stride(), value.element_size()
    if columns == 0 or columns * size % 16:
        raise ValueError(
            f"{name} has rows of {columns} x {size} bytes; a row must be a positive multiple of 16 bytes: "
            f"pad the hidden size to a multiple of {16 // size}"
        )
    # On a rank without tokens too, so that all ranks are told; but of nothing, a stride of 0 is as good as any.
    if stride > 1 or (stride != 1 and rows > 0):
        raise ValueError(f"{name} must have contiguous rows, but its strides are {value.stride()}; call .contiguous()")
    if rows == 0:
        return value
    if rows > 1 and (row_stride * size % 16 or row_stride < columns):
        raise ValueError(
            f"{name} has a row stride of {row_stride} x {size} bytes; it must be a multiple of 16 bytes and no "
            "less than a row: call .contiguous()"
        )
    if value.data_ptr() % 16:
        raise ValueError(f"{name} starts at an address that is no multiple of 16 bytes; copy it to one that is")
    return value


def carries_no_gradient(call: str, **values: Any) -> None:
    """None of the tensors, or of their pairs, asks for a gradient, which would be lost without a word."""
    if not torch.is_grad_enabled():
        return
    for name, value in values.items():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(each, torch.Tensor) and each.requires_grad:
                raise ValueError(
                    f"{name} requires a gradient, which buffer.{call} does not carry; use deep_ep.autograd.{call}, or "
                    "call it under torch.no_grad(), or inside a torch.autograd.Function of your own"
                )


def is_timeout(name: str, value: Any) -> float:
    """Seconds, more than 0 and at most a year."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number of seconds, but it is a {type(value).__name__}")
    if value <= 0 or not value <= YEAR:  # as for NaN
        raise ValueError(f"{name} must be more than 0 and at most {YEAR} seconds, but it is {value}")
    return float(value)


def is_speed(name: str, value: Any, may_be_0: bool) -> None:
    """GB/s, in the range of what there may be, or 0 for "unknown" where that is an answer."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number of GB/s, but it is a {type(value).__name__}")
    if not (value <= FASTEST_GBS and not value < SLOWEST_GBS) and not (may_be_0 and value == 0):
        or_0 = ", or 0 for what the machine tells" if may_be_0 else ""
        raise ValueError(f"{name} must be from {SLOWEST_GBS} to {FASTEST_GBS} GB/s{or_0}, but it is {value}")


def is_count(name: str, value: Any, low: int, high: int | None = None, advice: str = "") -> int:
    """A whole number in [low, high], of any integer type (NumPy's among them), as an int; of 64 bits in any case."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, but it is a {type(value).__name__}")
    if number < low or number > (LARGEST if high is None else high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        bounds += " and less than 2**63" if high is None and number > LARGEST else ""
        raise ValueError(f"{name} must be {bounds}, but it is {number}{'; ' + advice if advice else ''}")
    return number


def is_hidden(value: Any, advice: str) -> int:
    """Elements of a token, for which there is room: bfloat16, as combine sends them."""
    hidden = is_count("hidden", value, 1, advice=advice)
    if hidden % ROW_ELEMENTS:
        raise ValueError(
            f"hidden must be a multiple of {ROW_ELEMENTS}, for rows of 16-byte pieces, but it is {hidden}; pad it to "
            f"{-(-hidden // ROW_ELEMENTS) * ROW_ELEMENTS}, {advice}"
        )
    return hidden


def window_settings(num_max_tokens_per_rank: Any, hidden: Any, num_topk: Any) -> tuple[int, int, int]:
    """The three that a window's size follows from."""
    advice = "or pass num_bytes"
    return (
        is_max_tokens(num_max_tokens_per_rank, 1, advice),
        is_hidden(hidden, advice),
        is_count("num_topk", num_topk, 0, MAX_TOPK),
    )


def is_max_tokens(value: Any, low: int = 1, advice: str = "give it to the buffer or to the call") -> int:
    """Of a rank in one call."""
    is_count("num_max_tokens_per_rank", value, low, advice=advice)
    return is_count("num_max_tokens_per_rank", value, low, MAX_TOKENS - 1, "split the call")


def fitting_tokens(max_tokens: Any, num_tokens: int) -> int:
    """``max_tokens``, after seeing that the call has no more."""
    most = is_max_tokens(max_tokens)
    if num_tokens > most:
        raise ValueError(
            f"x has {num_tokens} tokens but num_max_tokens_per_rank is {most}; raise it on every rank or split the call"
        )
    return most


def is_expert_count(value: Any, num_ranks: int) -> int:
    if value is None:
        raise ValueError("num_experts must be given unless a handle is; pass the number of all ranks' experts together")
    num_experts = is_count("num_experts", value, 1, MAX_EXPERTS)
    if num_experts % num_ranks:
        raise ValueError(
            f"num_experts must be a multiple of the group's {num_ranks} ranks, but it is {num_experts}; pad the "
            f"experts to {-(-num_experts // num_ranks) * num_ranks}"
        )
    return num_experts


def is_topk_idx(value: Any, num_tokens: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if value is None:
        raise ValueError("topk_idx must be given unless a handle is; pass one row of expert ids per token")
    topk_idx = is_tensor("topk_idx", value, "TK", dtype, device)
    has_rows("topk_idx", topk_idx, num_tokens, "x has {}; pass one row of expert ids per token")
    if not 1 <= topk_idx.shape[1] <= MAX_TOPK:
        shape = list(topk_idx.shape)
        raise ValueError(f"topk_idx must have 1 to {MAX_TOPK} selections a token, but its shape is {shape}")
    return topk_idx


def is_weights(
    value: Any, name: str, rows: int, num_topk: int, device: torch.device, dims: str = "TK"
) -> torch.Tensor | None:
    if value is None:
        return None
    weights = is_tensor(name, value, dims, torch.float32, device)
    if weights.shape != (rows, num_topk):
        shape = list(weights.shape)
        raise ValueError(f"{name} must be [{rows}, {num_topk}], one weight a selection, but its shape is {shape}")
    return weights


def is_stats(value: Any, local_experts: int, device: torch.device) -> torch.Tensor | None:
    if value is None:
        return None
    name = "cumulative_local_expert_recv_stats"
    stats = is_tensor(name, value, "L", torch.int32, device)
    if stats.shape[0] != local_experts or not stats.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous [{local_experts}], a count for each local expert, but its shape is "
            f"{list(stats.shape)} and its strides are {stats.stride()}"
        )
    return stats


def is_row_weights(value: Any, name: str, rows: int, device: torch.device) -> torch.Tensor | None:
    """Of the expanded layout: one weight a row."""
    if value is None:
        return None
    weights = is_tensor(name, value, "X", torch.float32, device)
    if weights.shape[0] != rows:
        shape = list(weights.shape)
        raise ValueError(f"{name} must be [{rows}], one weight a row of the expanded layout, but its shape is {shape}")
    return weights


def are_valid_selections(topk_idx: torch.Tensor, num_experts: int) -> None:
    """Look at every index (this waits for the device): in range, and no expert twice in a token.

    Raises:
        ValueError: naming token and selection.
    """
    outside = ((topk_idx < -1) | (topk_idx >= num_experts)).nonzero()
    if len(outside):
        token, k = outside[0].tolist()
        raise ValueError(
            f"topk_idx[{token}, {k}] is {int(topk_idx[token, k])}, and {len(outside)} in all lie outside -1 to "
            f"{num_experts - 1}; use -1 for no expert"
        )
    ordered, where = topk_idx.sort(dim=1, stable=True)
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).nonzero()
    if len(twice):
        token, place = twice[0].tolist()
        first, second = sorted(where[token, place : place + 2].tolist())
        raise ValueError(
            f"topk_idx[{token}, {first}] and topk_idx[{token}, {second}] are both expert {int(ordered[token, place])}; "
            "a token selects each expert at most once: use -1 for the second"
        )


def is_own_handle(value: Any, group_ranks: tuple[int, ...], rank: int, device: torch.device) -> EPHandle:
    """A handle that a dispatch of this rank made, in a group of these ranks."""
    if not isinstance(value, EPHandle):
        raise TypeError(f"handle must be the EPHandle that dispatch returned, but it is a {type(value).__name__}")
    if value.group_ranks != group_ranks or value.rank != rank:
        raise ValueError(
            f"handle belongs to rank {value.rank} of a group of ranks {list(value.group_ranks)}, this buffer to rank "
            f"{rank} of {list(group_ranks)}; use it with a buffer of the group that dispatched"
        )
    if value.topk_idx.device != device:
        raise ValueError(f"handle lies on {value.topk_idx.device}, this buffer's kernels run on {device}")
    is_whole_handle(value, len(group_ranks))
    return value


def is_whole_handle(handle: EPHandle, num_ranks: int) -> None:
    """All but ``do_expand`` is as its dispatch left it, as far as sizes show; kernels go by them."""
    if handle.is_known:
        return
    tokens, experts = handle.num_recv_tokens, handle.num_experts
    selections, (local_experts, rest) = tuple(handle.topk_idx.shape), divmod(experts, num_ranks)
    shapes: dict[str, tuple[int, ...]] = {
        "dst_buffer_slot_idx": selections,
        "recv_src_metadata": (tokens, selections[1] + 2),
        "psum_num_recv_tokens_per_scaleup_rank": (num_ranks,),
        "psum_num_recv_tokens_per_expert": (local_experts,),
        "num_unaligned_recv_tokens_per_expert": (local_experts,),
        "per_expert_aligned": (local_experts,),
        "per_expert_end": (local_experts,),
        "number": (1,),
    }
    for name, shape in shapes.items():
        value = getattr(handle, name)
        if value.shape != shape or value.dtype != torch.int32 or not value.is_contiguous():
            raise ValueError(
                f"handle.{name} must be int32 {list(shape)} as its dispatch left it, but it is {value.dtype} "
                f"{list(value.shape)}; of a handle only do_expand may be set"
            )
    counts, max_tokens = handle.num_recv_tokens_per_expert_list, handle.num_max_tokens_per_rank
    if counts:
        expanded = sum(counts)
    else:
        sizes = (max_tokens, num_ranks, selections[1], local_experts, handle.expert_alignment)
        expanded = expanded_rows_at_most(*sizes)
    if rest or handle.num_expanded_tokens != expanded or len(counts) not in (0, local_experts):
        raise ValueError(
            f"handle.num_expanded_tokens must be {expanded} for {experts} experts and counts of {counts} as its "
            f"dispatch left it, but it is {handle.num_expanded_tokens}; of a handle only do_expand may be set"
        )
    handle.remember()


def biases(value: Any, num_tokens: int, hidden: int, device: torch.device) -> list[torch.Tensor]:
    """None, one or two [T, H] bfloat16 tensors, as a list."""
    if value is None:
        return []
    pair: Sequence[Any] = value if isinstance(value, (tuple, list)) else (value,)
    if not 1 <= len(pair) <= 2:
        raise ValueError(f"bias must be one tensor or a pair, but it has {len(pair)} elements")
    for bias in pair:
        is_tensor("bias", bias, "TH", torch.bfloat16, device)
        if tuple(bias.shape) != (num_tokens, hidden):
            raise ValueError(f"bias must be [{num_tokens}, {hidden}], but its shape is {list(bias.shape)}")
        is_row_matrix("bias", bias)
    return list(pair)


def agrees_with_handle(handle: EPHandle, topk_idx: Any, **given: Any) -> None:
    """A call by a handle is given nothing that its dispatch knows otherwise.

    Args:
        given: what the handle knows too, by its name there; None is left out.
    """
    if topk_idx is not None:
        raise ValueError("topk_idx and handle were both given; a handle holds the selections: leave topk_idx out")
    for name, value in given.items():
        if value is not None and value != (known := getattr(handle, name)):
            raise ValueError(f"{name} is {value} but the handle's dispatch had {known}; leave it out, or pass the same")


def are_flags(**values: Any) -> None:
    """True or False, NumPy's among them; not what only counts as one of them."""
    for name, value in values.items():
        if value is not True and value is not False and type(value).__name__ not in ("bool", "bool_"):
            raise TypeError(f"{name} must be True or False, but it is {value!r:.80}")


def is_timing(timing: Timing) -> None:
    are_flags(async_with_compute_stream=timing.asynchronous, allocate_on_comm_stream=timing.allocate_on_comm_stream)
    is_event("previous_event", timing.previous_event)
    is_event("previous_event_before_epilogue", timing.previous_event_before_epilogue)


def is_event(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, (EventOverlap, EventHandle)):
        raise TypeError(f"{name} must be an EventOverlap, an EventHandle or None, but it is a {type(value).__name__}")
