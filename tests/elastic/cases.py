"""Round trips through the public class, compared with the oracle bit for bit. Runs in each rank of a torchrun job."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

import deep_ep
from deep_ep.calls.received import Sizes
from tests import oracle
from tests.elastic import choices, combines, covering, registered, rooms
from tests.elastic.combines import Combine
from tests.elastic.dispatches import Dispatch, Options, check_handle


@dataclass(frozen=True)
class Case:
    """One round trip, the same on every rank. None stands for an argument that is left out."""

    seed: int
    tokens: tuple[int, ...]
    hidden: int
    num_topk: int
    num_experts: int
    kind: str
    alignment: int | None
    do_cpu_sync: bool | None
    with_weights: bool
    num_biases: int
    num_sms: int
    spare_tokens: int | None  # of num_max_tokens_per_rank, beyond what the case needs; None: as the buffer was built
    options: Options | None = None  # of the dispatch; None: a plain one of bfloat16 rows
    again: tuple[Options, ...] = ()  # of dispatches with the first one's handle, before the combine
    repeats_handle: bool = False  # those are told once more what the handle knows
    combining: combines.Options = combines.PLAIN
    barrier: bool = False  # between its calls and the combine
    do_handle_copy: bool = True
    num_qps: int = 0
    buffer: str = "settings"  # how it was built (worker.py)

    @property
    def first(self) -> Options:
        return self.options or Options(self.hidden, self.with_weights)

    @property
    def exact_sizes(self) -> bool:
        return self.do_cpu_sync is not False

    def sent(self) -> Case:
        """The same where nothing can be read in place."""
        first, *again = (replace(each, zero_copy=False) for each in (self.first, *self.again))
        return replace(self, options=first, again=tuple(again), combining=replace(self.combining, zero_copy=False))

    @staticmethod
    def of(row: covering.Row, seed: int, num_ranks: int, largest: int, longest: int) -> Case:
        """As chosen (choices.py). Where that leaves a size to chance, the seed says it.

        Args:
            largest: tokens of a rank, at most.
            longest: values of a row, at most, and then they are so many.
        """
        r = random.Random(seed)
        num_scales = 0 if row["scales"] is None else row["num_scales"]
        if num_scales == choices.ANY:
            num_scales = r.choice([2, 8, r.randint(1, 100)])
        hidden = choices.hidden(row["row_units"], r, 16 if num_scales else 8, longest)
        options, again = Options.of(row, hidden, num_scales), ()
        if row["handle"] is not None:
            first = Options(8 * r.randint(1, 16), row["with_weights"], do_expand=row["handle"] == "expanded")
            options, again = first, (options,)
        return Case(
            seed=seed,
            tokens=choices.tokens(row["tokens"], r, num_ranks, largest),
            hidden=choices.hidden(row["returned_units"], r, 8, longest),
            num_experts=row["local_experts"] * num_ranks,
            with_weights=row["returned_weights"],
            options=options,
            again=again,
            repeats_handle=row.get("repeats_handle", False),
            combining=combines.Options.of(row),
            barrier=r.random() < 0.2,
            **{name: row[name] for name in _AS_CHOSEN},
        )

    @staticmethod
    def draw(seed: int, num_ranks: int, largest: int, longest: int) -> Case:
        """Any of them, now and then with one more dispatch by the same handle."""
        r = random.Random(seed)
        case = Case.of(choices.draw(r), seed, num_ranks, largest, longest)
        if case.again and r.random() < 0.5:
            other = Case.of(
                {**choices.draw(r), "handle": None, "buffer": case.buffer}, seed + 1, num_ranks, largest, longest
            )
            return replace(case, again=(*case.again, other.first))
        return case

    @staticmethod
    def covering(num_ranks: int, largest: int, longest: int) -> list[Case]:
        """So that any two choices meet; the first ones hold most."""
        rows = covering.rows(choices.SPACE)
        return [Case.of(row, seed, num_ranks, largest, longest) for seed, row in enumerate(rows)]


_AS_CHOSEN = (
    "num_topk",
    "kind",
    "alignment",
    "do_cpu_sync",
    "num_biases",
    "num_sms",
    "spare_tokens",
    "do_handle_copy",
    "num_qps",
    "buffer",
)


class Trip:
    """Starts a dispatch and its combine; check() looks at the results. The rows to combine are drawn, so they need no
    result of the dispatch, and both calls may be under way at once.

    Args:
        case: the same on all ranks; rows are sent if the buffer has no registered memory.
        buffer: of this rank; its calls may leave their results for later.
    """

    def __init__(self, case: Case, buffer: deep_ep.ElasticBuffer, device: torch.device) -> None:
        if not registered.is_in(buffer):
            case = case.sent()
        self.case, self.rank = case, buffer.rank_idx
        num_ranks, options = buffer.num_ranks, case.first
        shape = (options.hidden, options.num_scales, case.num_topk, case.num_experts)
        self.inputs = oracle.draw(case.seed, num_ranks, list(case.tokens), *shape, case.kind)
        # A buffer that was built without that many has none to give.
        by_buffer = case.spare_tokens is None and buffer.num_max_tokens_per_rank >= max(1, *case.tokens)
        max_tokens = max(1, *case.tokens) + (case.spare_tokens or 0)
        if by_buffer:
            max_tokens = buffer.num_max_tokens_per_rank
        self.sizes = (case.num_experts, max_tokens, case.alignment or 1, not case.exact_sizes)
        self.expected = [oracle.dispatch(self.inputs, rank, *self.sizes) for rank in range(num_ranks)]
        mine = self.expected[self.rank]
        allocated = len(mine.tokens) if case.exact_sizes else num_ranks * max_tokens
        expanded = len(mine.expanded) if case.exact_sizes else mine.worst_case_rows
        with rooms.drawn(f"{case.seed} {self.rank}", Sizes(len(mine.tokens), len(mine.expanded))):
            self.dispatch = Dispatch(
                options,
                self.inputs,
                mine,
                buffer,
                device,
                expanded if options.do_expand else allocated,
                num_experts=case.num_experts,
                num_max_tokens_per_rank=None if by_buffer else max_tokens,
                do_handle_copy=case.do_handle_copy,
                **self._said_of_any_dispatch(),
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
            num_qps=case.num_qps,
        )

    def _said_of_any_dispatch(self) -> dict[str, Any]:
        """Arguments that make sense with a handle and without."""
        case = self.case
        return {
            "expert_alignment": case.alignment,
            "num_sms": case.num_sms,
            "num_qps": case.num_qps,
            "do_cpu_sync": case.do_cpu_sync,
        }

    def _dispatch_again(
        self, options: Options, idx: int, buffer: deep_ep.ElasticBuffer, device: torch.device, allocated: int
    ) -> Dispatch:
        """Other tokens by the same routes; what the handle knows is said again or left out."""
        handle = self.dispatch.handle
        inputs = oracle.redraw(self.inputs, self.case.seed + idx, options.hidden, options.num_scales)
        mine = oracle.dispatch(inputs, self.rank, *self.sizes)
        said: dict[str, Any] = {}
        if self.case.repeats_handle:
            sizes = {name: getattr(handle, name) for name in ("num_experts", "num_max_tokens_per_rank")}
            said = {**sizes, **self._said_of_any_dispatch()}
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
        check_handle(self.dispatch.handle, mine, last.do_expand, exact_sizes=case.exact_sizes)
        self.combine.check()


def run(case: Case, buffer: deep_ep.ElasticBuffer, device: torch.device) -> None:
    """Dispatch and combine; raises AssertionError, naming what differs."""
    Trip(case, buffer, device).check()


def agree_on_failure(error: BaseException | None, group: dist.ProcessGroup) -> list[str]:
    """Every rank's failure, so that all stop together."""
    failed = torch.tensor([error is not None], dtype=torch.int32)
    dist.all_reduce(failed, dist.ReduceOp.MAX, group)
    if not failed:
        return []
    texts: list[str | None] = [None] * group.size()
    dist.all_gather_object(texts, None if error is None else f"{type(error).__name__}: {error}", group=group)
    return [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text]
