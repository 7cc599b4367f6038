"""One rank of a job that calls the public class as frameworks do, each with its arguments and what it reads of results:

torchrun --nproc-per-node 2 -m tests.elastic.importers [--machine cuda]

Written from a table of who passes what; no line is theirs. Names, tuple shapes and layouts are the contract that they
stand on; results are held against sums that are easily worked out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from deep_ep import ElasticBuffer, EPHandle, EventOverlap, topk_idx_t
from deep_ep.utils import EventHandle
from deep_ep.utils import EventOverlap as OldEventOverlap
from tests.elastic import ranks

MOST, HIDDEN, TOPK, LOCAL = 16, 256, 4, 3  # tokens, elements, selections, experts of a rank


@dataclass(frozen=True)
class Inputs:
    """What one rank's router gives."""

    x: torch.Tensor
    topk_idx: torch.Tensor
    weights: torch.Tensor
    num_experts: int

    @staticmethod
    def draw(group: dist.ProcessGroup, device: torch.device) -> Inputs:
        chance = torch.Generator().manual_seed(17 + group.rank())
        num_tokens, num_experts = MOST - 3 - group.rank(), LOCAL * group.size()
        topk_weights, topk_idx = torch.rand(num_tokens, num_experts, generator=chance).topk(TOPK)
        topk_idx[1, 2] = topk_idx[4, :] = -1
        x = torch.randn(num_tokens, HIDDEN, generator=chance).bfloat16()
        return Inputs(x.to(device), topk_idx.to(device, topk_idx_t), topk_weights.to(device), num_experts)

    def sum_of_copies(self, of_each_selection: bool) -> torch.Tensor:
        """What combine makes of rows that come back as they went: each rank's copies added and rounded, then ranks."""
        total = torch.zeros(self.x.shape, device=self.x.device)
        for rank in range(self.num_experts // LOCAL):
            there = (self.topk_idx.div(LOCAL, rounding_mode="floor") == rank).sum(dim=1, keepdim=True)
            copies = there if of_each_selection else there.clamp(max=1)
            total += (copies * self.x.float()).bfloat16().float()
        return total.bfloat16()

    @property
    def weights_that_return(self) -> torch.Tensor:
        return self.weights.masked_fill(self.topk_idx < 0, 0.0)


def torchtitan(group: dist.ProcessGroup, device: torch.device) -> None:
    """Size and settings both; expanded rows for a grouped GEMM; gradients by the handle in both directions."""
    num_bytes = ElasticBuffer.get_buffer_size_hint(group, MOST, HIDDEN, num_topk=TOPK, use_fp8_dispatch=False)
    buffer = ElasticBuffer(
        group,
        num_bytes=num_bytes,
        num_max_tokens_per_rank=MOST,
        hidden=HIDDEN,
        num_topk=TOPK,
        use_fp8_dispatch=False,
        deterministic=True,
        explicitly_destroy=True,
    )
    assert buffer.group is group
    assert (buffer.num_bytes, buffer.num_max_tokens_per_rank) == (num_bytes, MOST)
    given = Inputs.draw(group, device)
    num_sms = buffer.get_theoretical_num_sms(given.num_experts, TOPK)
    recv_x, recv_idx, recv_weights, handle, _ = buffer.dispatch(
        given.x,
        topk_idx=given.topk_idx,
        topk_weights=given.weights,
        num_experts=given.num_experts,
        num_max_tokens_per_rank=MOST,
        num_sms=min(num_sms, 4),
        do_expand=True,
        do_cpu_sync=True,
    )
    assert recv_idx is None
    assert recv_weights.shape == recv_x.shape[:1]
    offsets = handle.psum_num_recv_tokens_per_expert
    assert offsets.tolist() == torch.tensor(handle.num_recv_tokens_per_expert_list).cumsum(0).tolist(), "alignment 1"
    assert handle.num_sms == min(num_sms, 4)
    combined, weights, event = buffer.combine(
        recv_x, handle, topk_weights=recv_weights, async_with_compute_stream=False
    )
    same(combined, given.sum_of_copies(of_each_selection=True))
    same(weights, given.weights_that_return)
    assert event.event is None
    gradient, _, _, again, _ = buffer.dispatch(
        combined, handle=handle, do_expand=True, num_sms=handle.num_sms, num_experts=given.num_experts
    )
    assert again is handle
    assert gradient.shape == recv_x.shape
    buffer.destroy()


def vllm(group: dist.ProcessGroup, device: torch.device) -> None:
    """Quantised rows, tensors of the communication stream, long limits."""
    buffer = ElasticBuffer(
        group=group,
        num_max_tokens_per_rank=MOST,
        hidden=HIDDEN,
        num_topk=TOPK,
        use_fp8_dispatch=True,
        deterministic=False,
        allow_hybrid_mode=False,
        allow_multiple_reduction=True,
        prefer_overlap_with_compute=True,
        num_cpu_timeout_secs=1800,
        num_gpu_timeout_secs=120,
        explicitly_destroy=True,
    )
    given = Inputs.draw(group, device)
    x8, scales = given.x.float().to(torch.float8_e4m3fn), torch.rand(len(given.x), HIDDEN // 128, device=device)
    for x in (given.x, (x8, scales)):
        received, recv_idx, recv_weights, handle, event = buffer.dispatch(
            x=x,
            topk_idx=given.topk_idx,
            topk_weights=given.weights,
            num_experts=given.num_experts,
            async_with_compute_stream=True,
            allocate_on_comm_stream=True,
        )
        assert event.event is not None
        event.current_stream_wait()
        rows = received[0] if isinstance(received, tuple) else received
        assert isinstance(received, tuple) == isinstance(x, tuple)
        assert int(handle.psum_num_recv_tokens_per_scaleup_rank[-1]) == len(rows) == len(recv_idx) == len(recv_weights)
        assert bool(((recv_idx >= -1) & (recv_idx < LOCAL)).all())
        combined, _, event = buffer.combine(
            x=rows.to(torch.bfloat16), handle=handle, async_with_compute_stream=True, allocate_on_comm_stream=True
        )
        event.current_stream_wait()
        sent = Inputs(x[0].bfloat16(), *vars_of(given)) if isinstance(x, tuple) else given
        same(combined, sent.sum_of_copies(of_each_selection=False))
    buffer.destroy()


def sglang(group: dist.ProcessGroup, device: torch.device) -> None:
    """Scale factors as a grouped GEMM's tensor maps want them; synchronous calls leave no event."""
    buffer = ElasticBuffer(
        group,
        num_max_tokens_per_rank=MOST,
        hidden=HIDDEN,
        num_topk=TOPK,
        use_fp8_dispatch=True,
        sl_idx=3,
        prefer_overlap_with_compute=False,
        explicitly_destroy=True,
    )
    assert buffer.num_bytes % (2 << 20) == 0
    given = Inputs.draw(group, device)
    num_sms = min(4, buffer.get_theoretical_num_sms(given.num_experts, TOPK))
    x8 = given.x.float().to(torch.float8_e4m3fn)
    packed = torch.randint(1 << 20, (len(x8), 1), dtype=torch.int32, device=device)
    (recv_x, recv_scales), recv_idx, _, handle, event = buffer.dispatch(
        (x8, packed),
        topk_idx=given.topk_idx,
        topk_weights=given.weights,
        num_experts=given.num_experts,
        expert_alignment=128,
        num_sms=num_sms,
        num_qps=buffer.get_theoretical_num_qps(num_sms),
        do_expand=True,
        do_cpu_sync=True,
        use_tma_aligned_col_major_sf=True,
    )
    assert event.event is None
    assert recv_idx is None
    assert recv_scales.stride() == (1, -(-len(recv_x) // 4) * 4)
    assert all(count % 128 == 0 for count in handle.num_recv_tokens_per_expert_list)
    assert len(recv_x) == sum(handle.num_recv_tokens_per_expert_list)
    combined, _, event = buffer.combine(recv_x.to(torch.bfloat16), handle, num_sms=num_sms)
    same(combined, Inputs(x8.bfloat16(), *vars_of(given)).sum_of_copies(of_each_selection=True))
    assert event.event is None
    buffer.destroy()


def deepspeed(group: dist.ProcessGroup, device: torch.device) -> None:
    """A cached dispatch of gradients, and weights of the expanded layout's one dimension."""
    buffer = ElasticBuffer(
        group, num_max_tokens_per_rank=MOST, hidden=HIDDEN, num_topk=TOPK, sl_idx=0, num_allocated_qps=0
    )
    given = Inputs.draw(group, device)
    assert given.topk_idx.dtype == topk_idx_t
    recv_x, _, recv_weights, handle, _ = buffer.dispatch(
        given.x,
        topk_idx=given.topk_idx,
        topk_weights=given.weights,
        num_experts=given.num_experts,
        do_expand=True,
        expert_alignment=8,
        do_zero_padding=True,
    )
    starts = torch.tensor([0, *handle.num_recv_tokens_per_expert_list]).cumsum(0)[:-1]
    ends = handle.psum_num_recv_tokens_per_expert.cpu()
    assert bool((starts % 8 == 0).all())
    for start, end, aligned in zip(starts, ends, handle.num_recv_tokens_per_expert_list, strict=True):
        assert not bool(recv_x[end : start + aligned].any()), "padding"
        assert not bool(recv_weights[end : start + aligned].any()), "padding"
    combined, weights, _ = buffer.combine(recv_x, handle, topk_weights=recv_weights)
    same(combined, given.sum_of_copies(of_each_selection=True))
    same(weights, given.weights_that_return)
    gradient, _, none, again, _ = buffer.dispatch(given.x, handle=handle, do_expand=True, do_zero_padding=True)
    assert none is None
    assert again is handle
    same(gradient, recv_x)
    buffer.destroy()
    buffer.destroy()


def megatron(group: dist.ProcessGroup, device: torch.device) -> None:
    """Events of the old module, in both directions of both calls."""
    assert OldEventOverlap is EventOverlap
    num_bytes = ElasticBuffer.get_buffer_size_hint(group, MOST, HIDDEN)
    buffer = ElasticBuffer(group, num_bytes)
    given = Inputs.draw(group, device)
    recv_x, recv_idx, recv_weights, handle, event = buffer.dispatch(
        given.x,
        topk_idx=given.topk_idx,
        topk_weights=given.weights,
        num_experts=given.num_experts,
        num_max_tokens_per_rank=MOST,
        expert_alignment=1,
        previous_event=EventOverlap(EventHandle()),
        async_with_compute_stream=True,
        allocate_on_comm_stream=True,
    )
    event.current_stream_wait()
    assert recv_idx.dtype == topk_idx_t
    combined, weights, event = buffer.combine(
        recv_x,
        handle,
        topk_weights=recv_weights,
        previous_event=ElasticBuffer.capture(),
        async_with_compute_stream=True,
        allocate_on_comm_stream=True,
    )
    event.current_stream_wait()
    same(combined, given.sum_of_copies(of_each_selection=False))
    same(weights, given.weights_that_return)
    buffer.destroy()


def lightllm(group: dist.ProcessGroup, device: torch.device) -> None:
    """Dispatches expanded, adds up a token's rows itself, and combines plain rows."""
    buffer = ElasticBuffer(group, num_max_tokens_per_rank=MOST, hidden=HIDDEN)
    given = Inputs.draw(group, device)
    recv_x, _, _, handle, _ = buffer.dispatch(
        given.x, topk_idx=given.topk_idx, num_experts=given.num_experts, do_expand=True
    )
    assert isinstance(handle, EPHandle)
    rows = handle.recv_src_metadata[:, 2:].long()  # of each token, where its selections' rows are
    first = rows.masked_fill(rows < 0, 1 << 30).amin(dim=1)
    handle.do_expand = False
    combined, _, _ = buffer.combine(recv_x[first], handle)
    same(combined, given.sum_of_copies(of_each_selection=False))
    buffer.destroy()


def vars_of(given: Inputs) -> tuple[torch.Tensor, torch.Tensor, int]:
    return given.topk_idx, given.weights, given.num_experts


def same(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(got.cpu(), expected.cpu())


IMPORTERS: tuple[Callable[[dist.ProcessGroup, torch.device], Any], ...] = (
    torchtitan,
    vllm,
    sglang,
    deepspeed,
    megatron,
    lightllm,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machine", choices=ranks.MACHINES, default="simulated")
    group, device = ranks.join(parser.parse_args().machine)
    for importer in IMPORTERS:
        importer(group, device)
        dist.barrier()
        if group.rank() == 0:
            print(f"{importer.__name__}: OK", flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
