"""Round trips that are all under way before the first is checked: tests/elastic/cases.py in two halves."""

from __future__ import annotations

import torch

import deep_ep
from tests import oracle
from tests.elastic.cases import Case, same, same_sums
from tests.elastic.combines import Combine


class Trip:
    """Starts a dispatch and its combine. The rows to combine are drawn, so they need no result of the dispatch.

    Args:
        case: the same on all ranks.
        buffer: of this rank; its calls may leave their results for later.
    """

    def __init__(self, case: Case, buffer: deep_ep.ElasticBuffer) -> None:
        self.case, self.rank = case, buffer.rank_idx
        num_ranks = buffer.num_ranks
        tokens = list(case.tokens)
        self.inputs = oracle.draw(case.seed, num_ranks, tokens, case.hidden, case.num_topk, case.num_experts, case.kind)
        max_tokens = max(1, *case.tokens) + case.spare_tokens
        self.expected = [
            oracle.dispatch(self.inputs, rank, case.num_experts, max_tokens, case.alignment)
            for rank in range(num_ranks)
        ]
        own = self.inputs[self.rank]
        self.recv_x, self.recv_idx, self.recv_weights, self.handle, _ = buffer.dispatch(
            own.x,
            topk_idx=own.topk_idx,
            topk_weights=own.weights if case.with_weights else None,
            num_experts=case.num_experts,
            num_max_tokens_per_rank=max_tokens,
            expert_alignment=case.alignment,
            num_sms=case.num_sms,
            do_cpu_sync=case.do_cpu_sync,
        )
        self.combine = Combine(
            case.combining,
            case.seed,
            self.handle,
            self.inputs,
            self.expected,
            buffer,
            torch.device("cpu"),
            case.hidden,
            with_weights=case.with_weights,
            num_biases=case.num_biases,
        )

    def check(self) -> None:
        """Everything that both calls returned, bit for bit; the kernels have run."""
        mine = self.expected[self.rank]
        rows = len(mine.tokens)
        assert self.recv_idx is not None
        same("recv_x", self.recv_x[:rows], mine.x)
        same("recv_topk_idx", self.recv_idx[:rows], mine.topk_idx)
        assert bool((self.recv_idx[rows:] == -1).all()), "rows past the real count must say -1"
        same("recv_src_metadata", self.handle.recv_src_metadata[:rows], mine.metadata)
        per_rank = torch.tensor(mine.per_rank, dtype=torch.int32)
        same("psum by rank", self.handle.psum_num_recv_tokens_per_scaleup_rank, per_rank)
        aligned = torch.tensor(mine.per_expert_aligned, dtype=torch.int32)
        same("psum by expert", self.handle.psum_num_recv_tokens_per_expert, aligned)
        if self.case.with_weights:
            assert self.recv_weights is not None
            same("recv_topk_weights", self.recv_weights[:rows], mine.weights)
        same_sums(self.combine, self.case.with_weights)
