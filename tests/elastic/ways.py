"""One rank of a job that uses buffers in every way that frameworks do:

torchrun --nproc-per-node 3 -m tests.elastic.ways [--machine cuda]
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

import deep_ep
from deep_ep import ElasticBuffer, EPHandle
from deep_ep.utils import per_token_cast_back, per_token_cast_to_fp8
from tests.elastic import cases, dispatches, ranks
from tests.elastic.dispatches import Options
from tests.elastic.memory import Memory, check_growth

TOKENS, HIDDEN, MOST = 7, 80, 16
SHORT_SLEEP = 10**8  # clocks of a GPU, some 50 ms
LARGE, WARM_UP, COMINGS = 32 << 20, 2, 8  # bytes of windows, of which few may not be left; buffers that come and go


def build(group: dist.ProcessGroup) -> ElasticBuffer:
    return ElasticBuffer(group, num_max_tokens_per_rank=MOST, hidden=1024, allow_multiple_reduction=False)


def draw(seed: int, group: dist.ProcessGroup) -> cases.Case:
    return cases.Case.draw(seed, group.size(), largest=MOST - 5, longest=1024)


def a_subgroup(group: dist.ProcessGroup, device: torch.device) -> None:
    """All ranks but the first; the first is told that it is no member."""
    others = dist.new_group(list(range(1, group.size())))
    if group.rank() == 0:
        try:
            build(others)
        except ValueError as error:
            assert "group does not contain this rank" in str(error)  # noqa: PT017
        return
    buffer = build(others)
    assert (buffer.rank_idx, buffer.num_ranks) == (group.rank() - 1, group.size() - 1)
    for seed in (10, 11):
        cases.run(draw(seed, others), buffer, device)
    buffer.destroy()


def a_given_size(group: dist.ProcessGroup, device: torch.device) -> None:
    """num_bytes wins over the settings, and stands alone where calls name their tokens themselves."""
    num_bytes = ElasticBuffer.get_buffer_size_hint(group, 2 * MOST, 1024, allow_multiple_reduction=False)
    for settings in ({"num_max_tokens_per_rank": 1, "hidden": 8}, {}):
        buffer = ElasticBuffer(group, num_bytes=num_bytes, **settings)
        assert buffer.num_bytes == num_bytes
        cases.run(draw(20, group), buffer, device)
        buffer.destroy()


def two_buffers_in_turn(group: dist.ProcessGroup, device: torch.device) -> None:
    """They do not know of each other, and a handle of one goes with the other."""
    first, second = build(group), build(group)
    for seed in (30, 31):
        cases.run(draw(seed, group), first, device)
        cases.run(draw(seed, group), second, device)
    results = dispatch(first, device)
    same(first.combine(results[0], results[3])[0], second.combine(results[0], results[3])[0])
    first.destroy()
    cases.run(draw(32, group), second, device)
    second.destroy()


def groups_side_by_side(group: dist.ProcessGroup, device: torch.device) -> None:
    """A rank is in two groups, and uses its buffers of both in turn, one of them with a call under way."""
    size, rank = group.size(), group.rank()
    # Neighbours: every group of two overlaps the next one, and all ranks make all groups, in the same order.
    pairs = [dist.new_group([first, first + 1]) for first in range(size - 1)]
    mine = [(first, pair) for first, pair in enumerate(pairs) if rank in (first, first + 1)]
    buffers = [(first, pair, build(pair)) for first, pair in mine]
    for round_idx in range(2):
        for first, pair, buffer in buffers:
            assert (buffer.rank_idx, buffer.num_ranks) == (rank - first, 2)
            cases.run(draw(60 + 2 * first + round_idx, pair), buffer, device)
    everybody = build(group)
    recv_x, _, _, handle, event = dispatch(everybody, device, async_with_compute_stream=True)
    for first, pair, buffer in buffers:
        cases.run(draw(70 + first, pair), buffer, device)
    event.current_stream_wait()
    same(everybody.combine(recv_x, handle)[0], everybody.combine(recv_x, handle)[0])
    for buffer in [everybody, *(buffer for _, _, buffer in buffers)]:
        buffer.destroy()


def one_buffer_for_all_sizes(group: dist.ProcessGroup, device: torch.device) -> None:
    """Hidden size, selections and experts change from call to call, up and down."""
    buffer = build(group)
    for hidden, num_topk, local_experts in ((1024, 8, 32), (8, 1, 1), (256, 32, 40), (1024, 2, 2), (64, 5, 3)):
        changes = {"hidden": hidden, "num_topk": num_topk, "num_experts": local_experts * group.size()}
        cases.run(replace(draw(80, group), **changes), buffer, device)
    buffer.destroy()


def a_group_that_goes_first(group: dist.ProcessGroup, device: torch.device) -> None:
    """destroy_process_group() comes before the buffer goes, by destroy() or by itself."""
    for explicitly in (True, False):
        subgroup = dist.new_group(list(range(group.size())))
        buffer = build(subgroup)
        cases.run(draw(90, subgroup), buffer, device)
        dist.barrier()
        dist.destroy_process_group(subgroup)
        if explicitly:
            buffer.destroy()
        del buffer
        gc.collect()
    after = build(group)
    cases.run(draw(91, group), after, device)
    after.destroy()


def a_buffer_that_is_dropped(group: dist.ProcessGroup, device: torch.device) -> None:
    """Whoever builds or calls the next one gives its memory back, after all that is still queued on it has run."""
    buffer = build(group)
    cases.run(draw(40, group), buffer, device)
    others = build(group)
    expected = dispatch(others, device)[0].clone()
    if device.type == "cuda":
        torch.cuda._sleep(4 * SHORT_SLEEP)
    late = dispatch(buffer, device, do_cpu_sync=False)
    del buffer
    gc.collect()
    same(dispatch(others, device)[0], expected)  # a call that frees
    same(late[0][: len(expected)], expected)
    after = build(group)
    cases.run(draw(41, group), after, device)
    after.destroy()
    others.destroy()


def buffers_that_come_and_go(group: dist.ProcessGroup, device: torch.device) -> None:
    """Destroyed or dropped, with calls between: each leaves nothing."""
    before: Memory | None = None
    for round_idx in range(WARM_UP + COMINGS):
        if round_idx == WARM_UP:
            before = Memory.now(device)
        buffer = ElasticBuffer(group, num_bytes=LARGE, num_max_tokens_per_rank=MOST)
        cases.run(draw(45, group), buffer, device)
        dist.barrier()
        if round_idx % 2:
            buffer.destroy()
        del buffer
        gc.collect()
    build(group).destroy()  # frees what was dropped
    dist.barrier()
    assert before is not None
    check_growth(before, Memory.now(device), COMINGS)


def rows_with_gaps(group: dist.ProcessGroup, device: torch.device) -> None:
    """Views of wider matrices, as x, as rows to combine and as biases."""
    buffer = build(group)
    plain = dispatch(buffer, device)
    gaps = dispatch(buffer, device, x=with_gaps(tokens(buffer, device)))
    same(plain[0], gaps[0])
    bias = tokens(buffer, device)
    expected = buffer.combine(plain[0], plain[3], bias=bias)[0]
    combined = buffer.combine(with_gaps(plain[0]), plain[3], bias=(with_gaps(bias), torch.zeros_like(bias)))[0]
    same(combined, expected)
    buffer.destroy()


def beside_the_compute_stream(group: dist.ProcessGroup, device: torch.device) -> None:
    """Events in all their combinations change when things happen, never what comes out."""
    buffer = build(group)
    plain = dispatch(buffer, device)
    expected = buffer.combine(plain[0], plain[3], topk_weights=plain[2])
    for allocate in (False, True):
        for previous in (None, buffer.capture(), plain[4]):
            timing = {
                "previous_event": previous,
                "previous_event_before_epilogue": buffer.capture(),
                "async_with_compute_stream": True,
                "allocate_on_comm_stream": allocate,
            }
            recv_x, recv_idx, recv_weights, handle, event = dispatch(buffer, device, **timing)
            assert event.event is not None
            with event:
                pass  # leaving waits
            for got, want in zip((recv_x, recv_idx, recv_weights), plain[:3], strict=True):
                same(got, want)
            timing["previous_event"] = buffer.capture()
            combined, weights, event = buffer.combine(recv_x, handle, topk_weights=recv_weights, **timing)
            event(release_handle=True)
            assert event.event is None
            same(combined, expected[0])
            same(weights, expected[1])
    for use_comm_stream in (True, False):
        for with_cpu_sync in (False, True):
            buffer.barrier(use_comm_stream, with_cpu_sync)
    buffer.destroy()


def who_keeps_memory(group: dist.ProcessGroup, device: torch.device) -> None:
    """What an asynchronous call reads and writes lives until its stream has come so far; or in its event, and is free
    as soon as that is let go of (EP_AVOID_RECORD_STREAM)."""
    if device.type != "cuda":
        return  # calls have ended when they return
    in_event = os.environ.get("EP_AVOID_RECORD_STREAM") == "1"
    buffer = build(group)
    results = dispatch(buffer, device, async_with_compute_stream=True)
    event = results[4]
    assert (event.extra_tensors is not None) == in_event
    event.current_stream_wait()
    torch.cuda.synchronize()
    with torch.cuda.stream(buffer.get_comm_stream()):
        torch.cuda._sleep(SHORT_SLEEP)
    before = active_bytes()
    del results
    event(release_handle=True)
    assert (active_bytes() < before) == in_event, (active_bytes(), before)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert active_bytes() < before
    buffer.destroy()


def results_that_outlive_their_event(group: dist.ProcessGroup, device: torch.device) -> None:
    """Calls that do not wait for the current stream must not get memory that is still to be read there."""
    if device.type != "cuda":
        return
    buffer = build(group)
    expected = dispatch(buffer, device)[0].clone()
    others = tokens(buffer, device) + 1
    torch.cuda.synchronize()
    timing = {"async_with_compute_stream": True, "allocate_on_comm_stream": True}
    recv_x, _, _, handle, event = dispatch(buffer, device, previous_event=buffer.capture(), **timing)
    event(release_handle=True)
    before = buffer.capture()
    torch.cuda._sleep(SHORT_SLEEP)
    read_late = recv_x.clone()
    del recv_x
    for _ in range(3):  # with a handle, so that nothing here waits for the sleeping stream
        buffer.dispatch(others, handle=handle, previous_event=before, **timing)[4].current_stream_wait()
    same(read_late, expected)
    buffer.destroy()


def active_bytes() -> int:
    """Of torch's allocator: in use, or not to be used again before some stream has come so far."""
    return int(torch.cuda.memory_stats()["active_bytes.all.current"])


def a_handle_again_and_again(group: dist.ProcessGroup, device: torch.device) -> None:
    """Combines of one dispatch do not disturb each other, nor does another dispatch in between."""
    buffer = build(group)
    recv_x, _, recv_weights, handle, _ = dispatch(buffer, device, do_handle_copy=False)
    expected = buffer.combine(recv_x, handle)[0]
    cases.run(draw(50, group), buffer, device)
    for num_sms in (1, 2, 3):
        combined, weights, event = buffer.combine(recv_x, handle, topk_weights=recv_weights, num_sms=num_sms)
        assert event.event is None
        same(combined, expected)
        assert weights is not None
    buffer.destroy()


def more_rows_than_the_worst_case(group: dist.ProcessGroup, device: torch.device) -> None:
    """Tokens must not name an expert twice. If all do, rows that find no room are lost, and nothing else is."""
    buffer = build(group)
    for do_expand in (True, False):
        case = cases.Case(
            seed=60,
            tokens=(TOKENS,) * group.size(),
            hidden=HIDDEN,
            num_topk=3,
            num_experts=group.size(),
            kind="same",
            alignment=1,
            do_cpu_sync=False,
            with_weights=True,
            num_biases=0,
            num_sms=3,
            spare_tokens=0,
            options=Options(HIDDEN, with_weights=True, do_expand=do_expand, do_zero_padding=True),
        )
        cases.run(case, buffer, device)
    buffer.destroy()


def quantised_rows(group: dist.ProcessGroup, device: torch.device) -> None:
    """What is cast, dispatched and cast back is what is dispatched after it was cast and cast back."""
    buffer = build(group)
    x = tokens(buffer, device)
    for packed in (False, True):
        x8, sf = per_token_cast_to_fp8(x, use_packed_ue8m0=packed)
        expected = dispatch(buffer, device, x=per_token_cast_back(x8, sf))[0]
        (recv_x8, recv_sf), *_ = dispatch(buffer, device, x=(x8, sf), use_tma_aligned_col_major_sf=packed)
        same(per_token_cast_back(recv_x8, recv_sf), expected)
    buffer.destroy()


def routes_that_are_known(group: dist.ProcessGroup, device: torch.device) -> None:
    """A handle goes with other tokens, with any layout, with another buffer and with its defaults; weights are new."""
    first, second = build(group), build(group)
    recv_x, recv_idx, recv_weights, handle, _ = dispatch(first, device)
    expanded_x, _, expanded_weights, other, _ = dispatch(first, device, do_expand=True, expert_alignment=1)
    ends_of_plain, ends = handle.psum_num_recv_tokens_per_expert, other.psum_num_recv_tokens_per_expert
    weights = torch.rand(TOKENS, 2, generator=torch.Generator().manual_seed(group.rank())).to(device)
    for buffer in (first, second, first):
        x, idx, no_weights, same_handle, event = buffer.dispatch(tokens(buffer, device), handle=handle)
        same(x, recv_x)
        same(idx, recv_idx)
        assert (no_weights, event.event) == (None, None)
        assert same_handle is handle
        x, idx, row_weights, _, _ = buffer.dispatch(
            tokens(buffer, device), handle=handle, topk_weights=weights, do_expand=True, do_cpu_sync=True
        )
        same(x, expanded_x)
        same(row_weights, expanded_weights)
        assert idx is None
        assert handle.do_expand
        same(handle.psum_num_recv_tokens_per_expert, ends)
        handle.do_expand = False
        assert buffer.combine(recv_x, handle, topk_weights=recv_weights)[0].shape == (TOKENS, HIDDEN)
        _, _, plain_weights, _, _ = buffer.dispatch(tokens(buffer, device), handle=handle, topk_weights=weights)
        same(plain_weights, recv_weights)
        same(handle.psum_num_recv_tokens_per_expert, ends_of_plain)
    first.destroy()
    second.destroy()


def what_the_guide_shows(group: dist.ProcessGroup, device: torch.device) -> None:
    """The functions of docs/guide.md, as they stand there."""
    guide: dict[str, Any] = {"torch": torch, "group": group}
    for code in re.findall(r"```python\n(.*?)```", (ranks.ROOT / "docs" / "guide.md").read_text(), re.DOTALL):
        exec(code, guide)
    guide["buffer"].destroy()
    buffer = build(group)
    x, num_experts = tokens(buffer, device), 2 * group.size()
    idx = (torch.arange(2 * TOKENS).reshape(TOKENS, 2) % num_experts).to(device, deep_ep.topk_idx_t)
    given = (buffer, x, idx, torch.ones(TOKENS, 2, device=device), num_experts)
    assert guide["moe_layer"](*given, lambda recv_x, *_: recv_x).shape == x.shape
    learning = (buffer, x.clone().requires_grad_(), *given[2:])
    guide["layer_that_learns"](*learning, lambda recv_x, *_: recv_x).sum().backward()
    assert learning[1].grad is not None
    cast = guide["dispatch_fp8"](*given)[0]
    identity = torch.eye(HIDDEN, dtype=torch.bfloat16, device=device).repeat(2, 1, 1)
    y, row_weights, handle = guide["experts_as_one_grouped_gemm"](*given, identity)
    assert cast.shape[0] == handle.num_recv_tokens
    assert row_weights.shape == (handle.num_expanded_tokens,)
    same(y, buffer.dispatch(x, handle=handle, do_expand=True, do_zero_padding=True)[0])
    twice = guide["layers_that_share_a_router"](*given, *[lambda recv_x, *_: recv_x] * 2)
    assert twice.shape == x.shape
    assert guide["gradient_of_combine"](buffer, x, handle).shape == y.shape
    buffer.destroy()
    in_place, registered_x, room = guide["rooms_for_rows"](group, TOKENS, HIDDEN)
    given = (registered_x.copy_(x), room, *given[2:])
    read = guide["layer_without_copies"](in_place, *given, lambda recv_x, *others: others[-1].copy_(recv_x))
    same(read, guide["moe_layer"](in_place, x, *given[2:], lambda recv_x, *_: recv_x))
    in_place.destroy()


def tokens(buffer: ElasticBuffer, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(buffer.rank_idx)
    return torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16().to(device)


def dispatch(
    buffer: ElasticBuffer, device: torch.device, **changes: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, EPHandle, deep_ep.EventOverlap]:
    """Every rank's tokens to two experts of any rank, one of them missing here and there."""
    num_experts = 4 * buffer.num_ranks
    idx = torch.arange(2 * TOKENS, dtype=deep_ep.topk_idx_t).reshape(TOKENS, 2) * 5 % num_experts
    idx[3, 0] = idx[5, 1] = -1
    weights = torch.rand(TOKENS, 2, generator=torch.Generator().manual_seed(buffer.rank_idx))
    good = {"x": tokens(buffer, device), "topk_weights": weights.to(device), "num_experts": num_experts}
    return buffer.dispatch(topk_idx=idx.to(device), **{**good, **changes})  # type: ignore[return-value]


def with_gaps(x: torch.Tensor) -> torch.Tensor:
    """The same matrix as a view whose rows lie further apart."""
    wide = torch.full((x.shape[0], x.shape[1] + 40), torch.nan, dtype=x.dtype, device=x.device)
    wide[:, 16 : 16 + x.shape[1]] = x
    return wide[:, 16 : 16 + x.shape[1]]


def same(got: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    assert got is not None
    assert expected is not None
    dispatches.same("the result", got, expected.cpu())


WAYS: tuple[Callable[[dist.ProcessGroup, torch.device], None], ...] = (
    a_subgroup,
    a_given_size,
    two_buffers_in_turn,
    groups_side_by_side,
    one_buffer_for_all_sizes,
    a_group_that_goes_first,
    a_buffer_that_is_dropped,
    buffers_that_come_and_go,
    rows_with_gaps,
    beside_the_compute_stream,
    who_keeps_memory,
    results_that_outlive_their_event,
    a_handle_again_and_again,
    more_rows_than_the_worst_case,
    quantised_rows,
    routes_that_are_known,
    what_the_guide_shows,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machine", choices=ranks.MACHINES, default="simulated")
    group, device = ranks.join(parser.parse_args().machine)
    for way in WAYS:
        way(group, device)
        dist.barrier()
        if group.rank() == 0:
            print(f"{way.__name__}: OK", flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
