"""Round trips through the public class, compared with the oracle bit for bit. Runs in each rank of a torchrun job."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

import deep_ep
from tests import oracle
from tests.elastic import combines
from tests.elastic.combines import Combine
from tests.elastic.dispatches import Dispatch, Options, check_handle


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
    options: Options | None = None  # of the dispatch; None: a plain one of bfloat16 rows
    again: tuple[Options, ...] = ()  # of dispatches with the first one's handle, before the combine
    combining: combines.Options = combines.PLAIN
    barrier: bool = False  # between its calls and the combine

    @property
    def first(self) -> Options:
        return self.options or Options(self.hidden, self.with_weights)

    @staticmethod
    def draw(seed: int, num_ranks: int, largest: int, longest: int) -> Case:
        """``largest``: tokens of a rank, at most. ``longest``: values of a row, at most, and then they are so many."""
        r = random.Random(seed)
        num_topk = r.choice([1, 2, 3, 4, 6, 8, 8, 8, 13, 32])
        local = r.choice([1, 2, 3, 4, 8, 32])
        tokens = tuple(r.choice([0, 1, r.randint(0, 8), r.randint(0, largest)]) for _ in range(num_ranks))
        case = Case(
            seed=seed,
            tokens=tokens,
            hidden=r.choice([8, 16, 24, 128, 8 * r.randint(1, 64), longest]),
            num_topk=num_topk,
            num_experts=local * num_ranks,
            kind=r.choice(["random", "random", "random", "holes", "skewed", "masked", "twice"]),
            alignment=r.choice([1, 1, 3, 8, 16, 128]),
            do_cpu_sync=r.random() < 0.5,
            with_weights=r.random() < 0.7,
            num_biases=r.choice([0, 0, 1, 2]),
            num_sms=r.choice([0, 1, 2, 3, 5, 24]),
            spare_tokens=r.choice([0, 0, 5]),
        )
        first = Options.draw(r, case.hidden, case.with_weights, longest)
        again = [
            Options.draw(r, 8 * r.randint(1, 64), with_weights=r.random() < 0.5, longest=longest)
            for _ in range(r.choice([0, 0, 1, 1, 2]))
        ]
        combining = combines.Options.draw(r)
        return replace(case, options=first, again=tuple(again), combining=combining, barrier=r.random() < 0.2)


class Trip:
    """Starts a dispatch and its combine; check() looks at the results. The rows to combine are drawn, so they need no
    result of the dispatch, and both calls may be under way at once.

    Args:
        case: the same on all ranks.
        buffer: of this rank; its calls may leave their results for later.
    """

    def __init__(self, case: Case, buffer: deep_ep.ElasticBuffer, device: torch.device) -> None:
        self.case, self.rank = case, buffer.rank_idx
        num_ranks, options = buffer.num_ranks, case.first
        shape = (options.hidden, options.num_scales, case.num_topk, case.num_experts)
        self.inputs = oracle.draw(case.seed, num_ranks, list(case.tokens), *shape, case.kind)
        max_tokens = max(1, *case.tokens) + case.spare_tokens
        self.expected = [
            oracle.dispatch(
                self.inputs, rank, case.num_experts, max_tokens, case.alignment, worst_case=not case.do_cpu_sync
            )
            for rank in range(num_ranks)
        ]
        mine = self.expected[self.rank]
        allocated = len(mine.tokens) if case.do_cpu_sync else num_ranks * max_tokens
        expanded = len(mine.expanded) if case.do_cpu_sync else mine.worst_case_rows
        self.dispatch = Dispatch(
            options,
            self.inputs,
            mine,
            buffer,
            device,
            expanded if options.do_expand else allocated,
            topk_idx=self.inputs[self.rank].topk_idx.to(device, deep_ep.topk_idx_t),
            num_experts=case.num_experts,
            num_max_tokens_per_rank=max_tokens,
            expert_alignment=case.alignment,
            num_sms=case.num_sms,
            do_cpu_sync=case.do_cpu_sync,
            do_handle_copy=case.seed % 3 != 0,
        )
        handle = self.dispatch.handle
        assert (handle.num_recv_tokens, handle.num_expanded_tokens) == (allocated, expanded)
        assert handle.do_expand == options.do_expand
        self.again = [
            self._dispatch_again(each, idx, buffer, device, expanded if each.do_expand else allocated)
            for idx, each in enumerate(case.again)
        ]
        if case.barrier:
            buffer.barrier(use_comm_stream=case.seed % 2 == 0, with_cpu_sync=case.seed % 3 == 0)
        self.combine = Combine(
            case.combining,
            case.seed,
            self.dispatch.handle,
            self.inputs,
            self.expected,
            buffer,
            device,
            case.hidden,
            with_weights=case.with_weights,
            num_biases=case.num_biases,
        )

    def _dispatch_again(
        self, options: Options, idx: int, buffer: deep_ep.ElasticBuffer, device: torch.device, allocated: int
    ) -> Dispatch:
        """Other tokens by the same routes; what the handle knows is said again or left out."""
        case, handle = self.case, self.dispatch.handle
        inputs = oracle.redraw(self.inputs, case.seed + idx, options.hidden, options.num_scales)
        max_tokens, worst_case = handle.num_max_tokens_per_rank, not case.do_cpu_sync
        mine = oracle.dispatch(inputs, self.rank, case.num_experts, max_tokens, case.alignment, worst_case=worst_case)
        said = {
            "num_experts": case.num_experts,
            "num_max_tokens_per_rank": max_tokens,
            "expert_alignment": case.alignment,
            "num_sms": case.num_sms,
            "do_cpu_sync": case.do_cpu_sync,
        }
        said = said if (case.seed + idx) % 2 else {}
        dispatch = Dispatch(options, inputs, mine, buffer, device, allocated, handle=handle, **said)
        assert dispatch.handle is handle
        assert handle.do_expand == options.do_expand
        return dispatch

    def check(self) -> None:
        """Everything that the calls returned, bit for bit; the kernels have run. Raises AssertionError, naming what
        differs."""
        case = self.case
        for dispatch in (self.dispatch, *self.again):
            dispatch.check()
        mine, last = self.expected[self.rank], (case.first, *case.again)[-1]
        check_handle(self.dispatch.handle, mine, last.do_expand, exact_sizes=case.do_cpu_sync)
        self.combine.check()


def run(case: Case, buffer: deep_ep.ElasticBuffer, device: torch.device) -> None:
    """Dispatch and combine; raises AssertionError, naming what differs."""
    Trip(case, buffer, device).check()


def agree_on_failure(error: BaseException | None, group: dist.ProcessGroup) -> list[str]:
    """Every rank's failure, so that all stop together."""
    texts: list[str | None] = [None] * group.size()
    dist.all_gather_object(texts, None if error is None else f"{type(error).__name__}: {error}", group=group)
    return [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text]
