"""One rank of a job that makes every mistake we know, and after each one a good call:

EP_BUFFER_DEBUG=1 torchrun --nproc-per-node 2 -m tests.elastic.bad_calls [--machine cuda]

Every rank makes the same mistake. Nothing may be launched then, so no rank waits for another, and the good call that
follows must be right to the last bit.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from deep_ep import ElasticBuffer, EPHandle, EventOverlap
from tests.elastic import cases, ranks
from tests.elastic.bad_in_place import NUM_REGISTERED_BYTES, wrong_in_place
from tests.elastic.mistakes import EXPERTS, HIDDEN, MOST, NUM_RANKS, TOKENS, TOPK, Mistake, Table

GOOD = cases.Case(
    seed=5,
    tokens=(TOKENS, 4),
    hidden=HIDDEN,
    num_topk=TOPK,
    num_experts=EXPERTS,
    kind="holes",
    alignment=4,
    do_cpu_sync=True,
    with_weights=True,
    num_biases=1,
    num_sms=2,
    spare_tokens=2,
)


def wrong_x(t: Table) -> Iterator[Mistake]:
    """The tokens of a dispatch."""
    yield t.mistake(TypeError, "x must be a torch.Tensor [T, H] of torch.bfloat16, but it is a NoneType", x=None)
    yield t.mistake(TypeError, "x must be torch.bfloat16, but it is torch.float16", x=t.x.half())
    yield t.mistake(ValueError, "x must be [T, H], but its shape is [6]", x=t.x[:, 0])
    yield t.mistake(ValueError, "x must be [T, H], but its shape is [1, 6, 64]", x=t.x[None])
    yield t.mistake(ValueError, "x has rows of 12 x 2 bytes", x=t.bf16(TOKENS, 12))
    yield t.mistake(ValueError, "x has rows of 0 x 2 bytes", x=t.bf16(TOKENS, 0))
    yield t.mistake(ValueError, "x must have contiguous rows, but its strides are (1, 6)", x=t.bf16(HIDDEN, TOKENS).t())
    yield t.mistake(ValueError, "x must have contiguous rows", x=t.bf16(0, 2 * HIDDEN)[:, ::2], topk_idx=t.topk_idx[:0])
    yield t.mistake(ValueError, "x has a row stride of 68 x 2 bytes", x=t.bf16(TOKENS, 68)[:, :HIDDEN])
    yield t.mistake(ValueError, "x has a row stride of 0 x 2 bytes", x=t.bf16(1, HIDDEN).expand(TOKENS, HIDDEN))
    yield t.mistake(ValueError, "x starts at an address", x=t.bf16(TOKENS, 72)[:, 4:68])
    yield t.mistake(ValueError, f"x must be on {t.device}", x=t.x.to("meta"))
    yield t.mistake(ValueError, "num_max_tokens_per_rank 32 with 524288 bytes a token", x=t.bf16(TOKENS, 1 << 18))


def wrong_fp8(t: Table) -> Iterator[Mistake]:
    """Quantised tokens, and what goes with them."""
    x8, sf = t.x.to(torch.float8_e4m3fn), torch.ones(TOKENS, 1, device=t.device)
    yield t.mistake(TypeError, "x is torch.float8_e4m3fn and has no scale factors; pass x as (x8, sf)", x=x8)
    yield t.mistake(ValueError, "x must be a tensor or a pair (x8, sf), but it has 3 elements", x=(x8, sf, sf))
    yield t.mistake(ValueError, "x must be a tensor or a pair (x8, sf), but it has 1 elements", x=[x8])
    text = "x[0] must be torch.float8_e4m3fn, but it is torch.bfloat16; deep_ep.utils.per_token_cast_to_fp8(x) makes"
    yield t.mistake(TypeError, text, x=(t.x, sf))
    yield t.mistake(TypeError, "x[0] must be a torch.Tensor [T, H] of torch.float8_e4m3fn", x=(None, sf))
    yield t.mistake(ValueError, "x[0] has rows of 24 x 1 bytes", x=(x8[:, :24], sf))
    yield t.mistake(TypeError, "x[1] must be torch.float32 or torch.int32, but it is torch.float16", x=(x8, sf.half()))
    yield t.mistake(TypeError, "x[1] must be a torch.Tensor [T, P] of torch.float32, but it is a float", x=(x8, 1.0))
    yield t.mistake(ValueError, "x[1] must be [T, P], but its shape is [6]", x=(x8, sf[:, 0]))
    yield t.mistake(ValueError, "x[1] has 5 rows but x[0] has 6", x=(x8, sf[:5]))
    yield t.mistake(ValueError, "1 to 512 scale factors a token", x=(x8, sf[:, :0]))
    yield t.mistake(ValueError, "1 to 512 scale factors a token", x=(x8, sf.expand(TOKENS, 513)))
    yield t.mistake(ValueError, f"x[1] must be on {t.device}", x=(x8, sf.to("meta")))
    text = "use_tma_aligned_col_major_sf says how to lay out scale factors, but x has none"
    yield t.mistake(ValueError, text, use_tma_aligned_col_major_sf=True)


def wrong_routing(t: Table) -> Iterator[Mistake]:
    """Selections, weights and counts of experts."""
    idx, weights = t.topk_idx, t.weights
    yield t.mistake(ValueError, "topk_idx must be given", topk_idx=None)
    yield t.mistake(TypeError, "topk_idx must be torch.int64, but it is torch.int32", topk_idx=idx.int())
    yield t.mistake(TypeError, "topk_idx must be a torch.Tensor [T, K]", topk_idx=idx.tolist())
    yield t.mistake(ValueError, "topk_idx has 5 rows but x has 6", topk_idx=idx[:5])
    yield t.mistake(ValueError, "topk_idx must be [T, K], but its shape is [6]", topk_idx=idx[:, 0])
    yield t.mistake(ValueError, "1 to 32 selections a token, but its shape is [6, 33]", topk_idx=idx.repeat(1, 11))
    yield t.mistake(ValueError, "1 to 32 selections a token, but its shape is [6, 0]", topk_idx=idx[:, :0])
    yield t.mistake(ValueError, f"topk_idx must be on {t.device}", topk_idx=idx.to("meta"))
    yield t.mistake(ValueError, "topk_idx[0, 0] is 8, and 2 in all lie outside -1 to 7", topk_idx=changed(idx, 8))
    yield t.mistake(ValueError, "topk_idx[0, 0] is -2, and 2 in all", topk_idx=changed(idx, -2))
    yield t.mistake(ValueError, "topk_idx[0, 0] and topk_idx[0, 2] are both expert 5", topk_idx=changed(idx, 5))
    yield t.mistake(
        TypeError, "topk_weights must be torch.float32, but it is torch.float64", topk_weights=weights.double()
    )
    yield t.mistake(ValueError, "topk_weights must be [6, 3]", topk_weights=weights[:, :2])
    yield t.mistake(ValueError, "topk_weights must be [6, 3]", topk_weights=weights[:4])
    yield t.mistake(ValueError, f"topk_weights must be on {t.device}", topk_weights=weights.to("meta"))
    yield t.mistake(ValueError, "num_experts must be given", num_experts=None)
    yield t.mistake(ValueError, "num_experts must be a multiple of the group's 2 ranks, but it is 7", num_experts=7)
    yield t.mistake(ValueError, "num_experts must be from 1 to 2048, but it is 0", num_experts=0)
    yield t.mistake(ValueError, "num_experts must be from 1 to 2048, but it is 4096", num_experts=4096)
    yield t.mistake(TypeError, "num_experts must be an int, but it is a float", num_experts=8.0)


def wrong_sizes(t: Table) -> Iterator[Mistake]:
    """Numbers and events of a dispatch."""
    yield t.mistake(ValueError, "x has 6 tokens but num_max_tokens_per_rank is 5", num_max_tokens_per_rank=5)
    yield t.mistake(ValueError, "x has 33 tokens but num_max_tokens_per_rank is 32", **many(t, MOST + 1))
    yield t.mistake(ValueError, "num_max_tokens_per_rank must be at least 1, but it is 0", num_max_tokens_per_rank=0)
    yield t.mistake(TypeError, "num_max_tokens_per_rank must be an int", num_max_tokens_per_rank="6")
    yield t.mistake(ValueError, "num_max_tokens_per_rank 1000000 with 128 bytes", num_max_tokens_per_rank=1_000_000)
    yield t.mistake(ValueError, "expert_alignment must be from 1 to 65536, but it is 0", expert_alignment=0)
    yield t.mistake(TypeError, "expert_alignment must be an int, but it is a float", expert_alignment=8.0)
    yield t.mistake(ValueError, "num_sms must be at least 0, but it is -1", num_sms=-1)
    for given in ("4", "", [], None):
        text = f"num_sms must be an int, but it is a {type(given).__name__}"
        for call in (t.mistake, t.again, t.combining):
            yield call(TypeError, text, num_sms=given)
    for call in (t.mistake, t.again, t.combining):
        yield call(ValueError, "num_qps must be at least 0, but it is -1", num_qps=-1)
        yield call(TypeError, "num_qps must be an int, but it is a str", num_qps="a")
        for name in ("async_with_compute_stream", "allocate_on_comm_stream"):
            yield call(TypeError, f"{name} must be True or False, but it is 'x'", **{name: "x"})
    for name in (
        "do_handle_copy",
        "do_cpu_sync",
        "do_expand",
        "do_zero_padding",
        "use_tma_aligned_col_major_sf",
        "zero_copy",
    ):
        yield t.mistake(TypeError, f"{name} must be True or False, but it is 2", **{name: 2})
        yield t.again(TypeError, f"{name} must be True or False, but it is 'yes'", **{name: "yes"})
    for name in ("use_comm_stream", "with_cpu_sync", "sequential"):
        meet = functools.partial(t.buffer.barrier, **{name: 1})
        yield Mistake(meet, f"barrier({name}=1)", TypeError, f"{name} must be True or False, but it is 1")
    stats, name = (
        torch.zeros(EXPERTS // NUM_RANKS, dtype=torch.int32, device=t.device),
        "cumulative_local_expert_recv_stats",
    )
    yield t.mistake(TypeError, f"{name} must be torch.int32, but it is torch.int64", **{name: stats.long()})
    yield t.mistake(ValueError, f"{name} must be contiguous [4], a count for each", **{name: stats[:3]})
    yield t.mistake(ValueError, f"{name} must be contiguous [4], a count for each", **{name: stats[:1].expand(4)})
    yield t.mistake(ValueError, f"{name} must be on {t.device}", **{name: stats.to("meta")})
    yield t.again(ValueError, f"{name} must be contiguous [4], a count for each", **{name: stats[:3]})
    for name in ("previous_event", "previous_event_before_epilogue"):
        text = f"{name} must be an EventOverlap, an EventHandle or None, but it is a str"
        yield t.mistake(TypeError, text, **{name: "now"})
        yield t.combining(TypeError, text, **{name: "now"})


def wrong_handles(t: Table, of_one_rank: ElasticBuffer, larger: ElasticBuffer) -> Iterator[Mistake]:
    """A dispatch that uses the routing of an earlier one."""
    handle = t.handle
    yield t.again(ValueError, "topk_idx and handle were both given", topk_idx=t.topk_idx)
    yield t.again(TypeError, "handle must be the EPHandle that dispatch returned, but it is a Tensor", handle=t.x)
    yield t.again(ValueError, "x has 5 tokens but the handle's dispatch had 6", x=t.x[:5])
    yield t.again(ValueError, "topk_weights must be [6, 3]", topk_weights=t.weights[:, :2])
    yield t.again(ValueError, "num_experts is 4 but the handle's dispatch had 8", num_experts=4)
    yield t.again(ValueError, "num_max_tokens_per_rank is 31 but the handle's", num_max_tokens_per_rank=MOST - 1)
    yield t.again(ValueError, "expert_alignment is 2 but the handle's dispatch had 1", expert_alignment=2)
    alone = of_one_rank.dispatch(t.x, topk_idx=t.topk_idx, num_experts=EXPERTS)[3]
    yield t.again(ValueError, "handle belongs to rank 0 of a group of ranks [", handle=alone)
    other = larger.dispatch(num_experts=EXPERTS, num_max_tokens_per_rank=100_000, **many(t, TOKENS))[3]
    text = "num_max_tokens_per_rank 100000 with 128 bytes a token"
    yield t.again(ValueError, text, handle=other)
    for edited in edited_handles(handle):
        yield t.again(ValueError, "of a handle only do_expand may be set", handle=edited, num_experts=None)
    worst = t.dispatch(do_cpu_sync=False)[3]
    edited_worst = replace(worst, num_expanded_tokens=worst.num_expanded_tokens - 1)
    yield t.again(ValueError, f"handle.num_expanded_tokens must be {worst.num_expanded_tokens}", handle=edited_worst)


def edited_handles(handle: EPHandle) -> Iterator[EPHandle]:
    """Of a handle only do_expand may be set."""
    for edited in (
        {"num_recv_tokens": handle.num_recv_tokens + 1},
        {"num_expanded_tokens": handle.num_expanded_tokens + 1},
        {"num_experts": 2 * EXPERTS},
        {"num_experts": EXPERTS + 1},
        {"num_recv_tokens_per_expert_list": [*handle.num_recv_tokens_per_expert_list, 0]},
        {"num_recv_tokens_per_expert_list": []},
        {"topk_idx": handle.topk_idx[:, :2]},
        {"dst_buffer_slot_idx": handle.dst_buffer_slot_idx[:-1]},
        {"dst_buffer_slot_idx": handle.dst_buffer_slot_idx.long()},
        {"recv_src_metadata": handle.recv_src_metadata.t()},
        {"number": handle.number[:0]},
    ):
        yield replace(handle, **edited)


def wrong_combines(t: Table, of_one_rank: ElasticBuffer, larger: ElasticBuffer) -> Iterator[Mistake]:
    """Every argument of combine."""
    x, weights, rows = t.recv_x, t.recv_weights, t.rows
    bias = t.bf16(TOKENS, HIDDEN)
    yield t.combining(TypeError, "x must be a torch.Tensor [N, H] of torch.bfloat16", x=None)
    yield t.combining(TypeError, "x must be torch.bfloat16, but it is torch.float32", x=x.float())
    yield t.combining(ValueError, f"x has {rows - 1} rows but the handle's dispatch returned {rows}", x=x[:-1])
    yield t.combining(ValueError, "x must be [N, H], but its shape is", x=x[None])
    yield t.combining(ValueError, "x has rows of 12 x 2 bytes", x=t.bf16(rows, 12))
    yield t.combining(ValueError, "x must have contiguous rows", x=t.bf16(HIDDEN, rows).t())
    yield t.combining(ValueError, f"x must be on {t.device}", x=x.to("meta"))
    yield t.combining(ValueError, "num_max_tokens_per_rank 32 with 2097152 bytes a token", x=t.bf16(rows, 1 << 20))
    yield t.combining(
        TypeError, "handle must be the EPHandle that dispatch returned, but it is a NoneType", handle=None
    )
    yield t.combining(TypeError, "handle must be the EPHandle that dispatch returned, but it is a Tensor", handle=x)
    for edited in edited_handles(t.handle):
        yield t.combining(ValueError, "of a handle only do_expand may be set", handle=edited)
    alone = of_one_rank.dispatch(t.x, topk_idx=t.topk_idx, num_experts=EXPERTS)[3]
    yield t.combining(ValueError, "handle belongs to rank 0 of a group of ranks [", handle=alone)
    many_tokens = many(t, 6)
    other_x, _, _, other, _ = larger.dispatch(num_experts=EXPERTS, num_max_tokens_per_rank=100_000, **many_tokens)
    text = "num_max_tokens_per_rank 100000 with 128 bytes a token"
    yield t.combining(ValueError, text, x=other_x, handle=other, topk_weights=None)
    yield t.combining(TypeError, "topk_weights must be torch.float32", topk_weights=weights.bfloat16())
    yield t.combining(ValueError, f"topk_weights must be [{rows}, 3]", topk_weights=weights[:-1])
    yield t.combining(ValueError, "topk_weights must be [N, K], but its shape is", topk_weights=weights[0])
    yield t.combining(ValueError, f"topk_weights must be on {t.device}", topk_weights=weights.to("meta"))
    yield t.combining(ValueError, "bias must be [6, 64], but its shape is [5, 64]", bias=bias[:5])
    yield t.combining(TypeError, "bias must be torch.bfloat16, but it is torch.float32", bias=bias.float())
    yield t.combining(ValueError, "bias must be one tensor or a pair, but it has 3 elements", bias=(bias, bias, bias))
    yield t.combining(TypeError, "bias must be a torch.Tensor [T, H]", bias=(bias, None))
    yield t.combining(ValueError, f"bias must be on {t.device}", bias=bias.to("meta"))
    yield t.combining(ValueError, "num_sms must be at least 0, but it is -3", num_sms=-3)
    yield t.combining(TypeError, "num_sms must be an int, but it is a float", num_sms=2.5)


def wrong_expanded_combines(t: Table) -> Iterator[Mistake]:
    """What combine takes if the handle says so."""
    handle = t.dispatch(expert_alignment=4)[3]
    handle.do_expand = True
    rows = handle.num_expanded_tokens
    x, weights = t.bf16(rows, HIDDEN), torch.zeros(rows, device=t.device)

    def combining(text: str, kind: type[Exception] = ValueError, **changes: Any) -> Mistake:
        return t.combining(kind, text, **{"handle": handle, "x": x, "topk_weights": weights, **changes})

    yield combining(f"x has {t.rows} rows but the handle's expanded layout has {rows}; pass it whole", x=t.recv_x)
    yield combining(f"x has {rows - 1} rows but the handle's expanded layout has {rows}", x=x[:-1])
    yield combining("topk_weights must be [X], but its shape is [", topk_weights=t.recv_weights)
    yield combining(f"topk_weights must be [{rows}], one weight a row of the expanded", topk_weights=weights[1:])
    yield combining("topk_weights must be torch.float32", TypeError, topk_weights=weights.half())
    yield combining(f"topk_weights must be on {t.device}", topk_weights=weights.to("meta"))

    def one_by_one() -> None:
        t.buffer.allow_multiple_reduction = False
        try:
            t.combine(handle=handle, x=t.bf16(rows, 1 << 16), topk_weights=None)
        finally:
            t.buffer.allow_multiple_reduction = True

    text = "num_max_tokens_per_rank 32 with 3 rows of 131072 bytes a token (allow_multiple_reduction is False) and 2"
    yield Mistake(one_by_one, "a combine row by row", ValueError, text)


def wrong_buffers(t: Table) -> Iterator[Mistake]:
    """The constructor; a size hint asks the same questions."""
    outside = dist.GroupMember.NON_GROUP_MEMBER
    for group, kind, text in (
        (None, TypeError, "group must be a torch.distributed.ProcessGroup, but it is a NoneType"),
        ("gloo", TypeError, "group must be a torch.distributed.ProcessGroup, but it is a str"),
        (outside, ValueError, "group does not contain this rank"),
    ):
        yield t.building(kind, text, group=group)
        hint = functools.partial(ElasticBuffer.get_buffer_size_hint, group, MOST, HIDDEN)
        yield Mistake(hint, f"get_buffer_size_hint({group!r})", kind, text)
    yield t.building(ValueError, "num_max_tokens_per_rank must be at least 1, but it is 0", num_max_tokens_per_rank=0)
    yield t.building(ValueError, "num_max_tokens_per_rank must be at least 0, but it is -1", num_max_tokens_per_rank=-1)
    too_many = "num_max_tokens_per_rank must be from 1 to 2097151, but it is 2097152"
    yield t.building(ValueError, too_many.replace("from 1", "from 0"), num_max_tokens_per_rank=1 << 21)
    hint = functools.partial(ElasticBuffer.get_buffer_size_hint, t.buffer.group, 1 << 21, HIDDEN)
    yield Mistake(hint, "get_buffer_size_hint of too many tokens", ValueError, too_many)
    yield t.building(ValueError, "hidden must be at least 1, but it is 0; or pass num_bytes", hidden=0)
    yield t.building(TypeError, "hidden must be an int, but it is a float", hidden=64.0)
    yield t.building(ValueError, "hidden must be a multiple of 8, for rows of 16-byte pieces, but it is 7", hidden=7)
    yield t.building(ValueError, "num_cpu_bytes must be at least 0, but it is -3", num_cpu_bytes=-3)
    yield t.building(ValueError, "num_allocated_qps must be at least 0, but it is -1", num_allocated_qps=-1)
    yield t.building(ValueError, "sl_idx must be from 0 to 15, but it is 16", sl_idx=16)
    yield t.building(TypeError, "sl_idx must be an int, but it is a str", sl_idx="3")
    for name in (
        "use_fp8_dispatch",
        "deterministic",
        "allow_hybrid_mode",
        "allow_multiple_reduction",
        "prefer_overlap_with_compute",
        "explicitly_destroy",
    ):
        yield t.building(TypeError, f"{name} must be True or False, but it is 'no'", **{name: "no"})
    yield t.building(ValueError, "num_topk must be from 0 to 32, but it is 33", num_topk=33)
    yield t.building(ValueError, "num_registered_bytes must be from 0 to", num_registered_bytes=-1)
    yield t.building(ValueError, "num_registered_bytes must be from 0 to 17179869184", num_registered_bytes=1 << 35)
    yield t.building(TypeError, "num_registered_bytes must be an int, but it is a float", num_registered_bytes=1e6)
    yield t.building(ValueError, "num_bytes must be a positive multiple of 2 MiB", num_bytes=(2 << 20) + 1)
    yield t.building(ValueError, "num_bytes must be at least", num_bytes=2 << 20)
    yield t.building(TypeError, "num_bytes must be an int, but it is a float", num_bytes=1e9)


def wrong_afterlife(t: Table, destroyed: ElasticBuffer) -> Iterator[Mistake]:
    """A buffer that was destroyed (twice) does nothing more."""
    text = "this buffer was destroyed; build a new ElasticBuffer"
    calls: dict[str, Callable[[], Any]] = {
        "dispatch": lambda: destroyed.dispatch(t.x, topk_idx=t.topk_idx, num_experts=EXPERTS),
        "combine": lambda: destroyed.combine(t.recv_x, t.handle),
        "barrier": destroyed.barrier,
        "get_comm_stream": destroyed.get_comm_stream,
        "registered_empty": lambda: destroyed.registered_empty([0]),
    }
    for name, call in calls.items():
        yield Mistake(call, f"{name} of a destroyed buffer", ValueError, text)


def changed(topk_idx: torch.Tensor, expert: int) -> torch.Tensor:
    """Two tokens select something else first."""
    topk_idx = topk_idx.clone()
    topk_idx[0, 0] = topk_idx[3, 0] = expert
    return topk_idx


def many(t: Table, tokens: int) -> dict[str, Any]:
    """The arguments of a dispatch of so many tokens."""
    idx = torch.zeros(tokens, TOPK, dtype=torch.int64, device=t.device)
    idx[:, 1:] = -1
    return {"x": t.bf16(tokens, HIDDEN), "topk_idx": idx, "topk_weights": None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machine", choices=ranks.MACHINES, default="simulated")
    group, device = ranks.join(parser.parse_args().machine)
    every_rank_alone = [dist.new_group([rank]) for rank in range(group.size())]
    alone = every_rank_alone[group.rank()]

    def build(ranks_of_it: dist.ProcessGroup, tokens: int = MOST, **more: Any) -> ElasticBuffer:
        return ElasticBuffer(ranks_of_it, num_max_tokens_per_rank=tokens, hidden=HIDDEN, **more)

    buffer = build(group, num_registered_bytes=NUM_REGISTERED_BYTES)
    of_one_rank, larger, destroyed = build(alone), build(group, 100_000), build(group)
    destroyed.destroy()
    destroyed.destroy()
    table = Table(buffer, device)
    mistakes = [
        *wrong_x(table),
        *wrong_fp8(table),
        *wrong_routing(table),
        *wrong_sizes(table),
        *wrong_handles(table, of_one_rank, larger),
        *wrong_combines(table, of_one_rank, larger),
        *wrong_expanded_combines(table),
        *wrong_in_place(table, larger),
        *wrong_buffers(table),
        *wrong_afterlife(table, destroyed),
    ]
    complaints = []
    for mistake in mistakes:
        complaint = mistake.complaint()
        try:
            cases.run(GOOD, buffer, device)
        except AssertionError as error:
            complaint = f"{mistake.change}: the good call after it: {error}"
        if complaint:
            complaints.append(f"rank {group.rank()}: {complaint}")
    # One rank alone makes a mistake, and then the call that its peer has made meanwhile: the peer has only waited.
    if group.rank() == 1:
        assert mistakes[0].complaint() is None
    cases.run(GOOD, buffer, device)
    # A handle outlives its buffer, and goes with any of the same ranks and sizes.
    assert isinstance(larger.combine(table.recv_x, table.handle)[2], EventOverlap)
    print(*complaints, sep="\n")
    print(f"rank {group.rank()}: {len(mistakes)} mistakes, {len(complaints)} answered wrongly")
    for each in (buffer, of_one_rank, larger):
        each.destroy()
    dist.destroy_process_group()
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
