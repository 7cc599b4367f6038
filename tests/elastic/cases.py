"""Round trips through the public class, compared with the oracle bit for bit. Runs in each rank of a torchrun job."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.distributed as dist

import deep_ep
from tests import oracle
from tests.elastic import combines
from tests.elastic.combines import Combine


@dataclass(frozen=True)
class Case:
    """One round trip, the same on every rank, drawn from a seed."""

    seed: int
    tokens: tuple[int, ...]
    hidden: int
    num_topk: int
    num_experts: int
    kind: str
    alignment: int
    do_cpu_sync: bool
    with_weights: bool
    num_biases: int
    num_sms: int
    spare_tokens: int
    combining: combines.Options = combines.PLAIN

    @staticmethod
    def draw(seed: int, num_ranks: int, largest: int) -> Case:
        """``largest``: tokens of a rank, at most."""
        r = random.Random(seed)
        num_topk = r.choice([1, 2, 3, 4, 6, 8, 8, 8, 13, 32])
        local = r.choice([1, 2, 3, 4, 8, 32])
        tokens = tuple(r.choice([0, 1, r.randint(0, 8), r.randint(0, largest)]) for _ in range(num_ranks))
        return Case(
            seed=seed,
            tokens=tokens,
            hidden=8 * r.choice([1, 2, 3, 16, r.randint(1, 64), 128]),
            num_topk=num_topk,
            num_experts=local * num_ranks,
            kind=r.choice(["random", "random", "random", "holes", "skewed", "masked"]),
            alignment=r.choice([1, 1, 8, 128]),
            do_cpu_sync=r.random() < 0.5,
            with_weights=r.random() < 0.7,
            num_biases=r.choice([0, 0, 1, 2]),
            num_sms=r.choice([0, 1, 2, 3, 5, 24]),
            spare_tokens=r.choice([0, 0, 5]),
            combining=combines.Options.draw(r),
        )


def run(case: Case, buffer: deep_ep.ElasticBuffer, device: torch.device) -> None:
    """Dispatch and combine; raises AssertionError, naming what differs."""
    rank, num_ranks = buffer.rank_idx, buffer.num_ranks
    inputs = oracle.draw(
        case.seed, num_ranks, list(case.tokens), case.hidden, case.num_topk, case.num_experts, case.kind
    )
    max_tokens = max(1, *case.tokens) + case.spare_tokens
    own = inputs[rank]
    expected = [oracle.dispatch(inputs, r, case.num_experts, max_tokens, case.alignment) for r in range(num_ranks)]
    mine = expected[rank]

    recv_x, recv_idx, recv_weights, handle, event = buffer.dispatch(
        own.x.to(device),
        topk_idx=own.topk_idx.to(device, deep_ep.topk_idx_t),
        topk_weights=own.weights.to(device) if case.with_weights else None,
        num_experts=case.num_experts,
        num_max_tokens_per_rank=max_tokens,
        expert_alignment=case.alignment,
        num_sms=case.num_sms,
        do_cpu_sync=case.do_cpu_sync,
    )
    assert event.event is None
    rows = len(mine.tokens)
    allocated = rows if case.do_cpu_sync else num_ranks * max_tokens
    same("recv_x", recv_x[:rows], mine.x)
    assert recv_x.shape[0] == allocated == handle.num_recv_tokens
    assert recv_idx is not None
    same("recv_topk_idx", recv_idx[:rows], mine.topk_idx.to(deep_ep.topk_idx_t))
    assert bool((recv_idx[rows:] == -1).all()), "rows past the real count must say -1"
    if case.with_weights:
        assert recv_weights is not None
        same("recv_topk_weights", recv_weights[:rows], mine.weights)
    else:
        assert recv_weights is None
    same("recv_src_metadata", handle.recv_src_metadata[:rows], mine.metadata)
    same("psum by rank", handle.psum_num_recv_tokens_per_scaleup_rank, torch.tensor(mine.per_rank, dtype=torch.int32))
    aligned = torch.tensor(mine.per_expert_aligned, dtype=torch.int32)
    same("psum by expert", handle.psum_num_recv_tokens_per_expert, aligned)
    counts = torch.tensor(mine.per_expert, dtype=torch.int32)
    same("counts by expert", handle.num_unaligned_recv_tokens_per_expert, counts)
    assert handle.num_recv_tokens_per_expert_list == (mine.aligned_list if case.do_cpu_sync else [])

    combine = Combine(
        case.combining,
        case.seed,
        handle,
        inputs,
        expected,
        buffer,
        device,
        case.hidden,
        with_weights=case.with_weights,
        num_biases=case.num_biases,
    )
    same_sums(combine, case.with_weights)


def same_sums(combine: Combine, with_weights: bool) -> None:
    """What a combine returned is what the oracle says."""
    sums, gathered = combine.expected()
    same("combined_x", combine.combined, sums)
    if with_weights:
        assert combine.combined_weights is not None
        same("combined_topk_weights", combine.combined_weights, gathered)
    else:
        assert combine.combined_weights is None


def same(what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    got = got.cpu()
    assert got.shape == expected.shape, f"{what} is {list(got.shape)}, expected {list(expected.shape)}"
    assert got.dtype == expected.dtype, f"{what} is {got.dtype}, expected {expected.dtype}"
    as_bits = {torch.bfloat16: torch.int16, torch.float32: torch.int32}.get(got.dtype, got.dtype)
    wrong = (got.view(as_bits) != expected.view(as_bits)).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        count = f"{len(wrong)} of {got.numel()} places"
        raise AssertionError(f"{what} differs in {count}, first at {at}: {got[at]}, expected {expected[at]}")


def agree_on_failure(error: BaseException | None, group: dist.ProcessGroup) -> list[str]:
    """Every rank's failure, so that all stop together."""
    texts: list[str | None] = [None] * group.size()
    dist.all_gather_object(texts, None if error is None else f"{type(error).__name__}: {error}", group=group)
    return [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text]
