"""One combine with all its options: what it is given, and that what it returns is the oracle's, to the bit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

import deep_ep
from tests import oracle
from tests.elastic import registered, timings
from tests.elastic.covering import Row
from tests.elastic.dispatches import same, with_gaps


@dataclass(frozen=True)
class Options:
    """How one combine of a case differs from a plain one.

    Attributes:
        expanded: rows have the expanded layout.
        multiple_reduction: those of a token are added on their rank first.
        row_gaps: rows, and those of biases, lie further apart than they are long.
        num_sms: of the call; 0 is what the handle's dispatch was told, or the analytic choice.
    """

    expanded: bool = False
    multiple_reduction: bool = True
    row_gaps: bool = False
    num_sms: int = 0
    zero_copy: bool = False
    timing: timings.Timing = timings.AT_ONCE

    @staticmethod
    def of(row: Row) -> Options:
        """As chosen (choices.py)."""
        expanded, multiple_reduction = row["returned"]
        timing = timings.Timing(
            row["returning_previous_event"],
            row["returning_before_epilogue"],
            row["returning_asynchronous"],
            row["returning_on_comm_stream"],
        )
        return Options(
            expanded,
            multiple_reduction,
            row["returned_gaps"],
            row["returning_sms"],
            row.get("returned_zero_copy", False) and row["buffer"] == "settings",
            timing,
        )


PLAIN = Options()


def rows_to_add(count: int, hidden: int, chance: torch.Generator) -> torch.Tensor:
    """Rows of which the sum depends on the order: among values about 1 are huge ones, which swallow bits of what was
    added before them and take each other away."""
    shape = (count, hidden)
    values = torch.randn(shape, generator=chance)
    sign = torch.randint(-1, 3, shape, generator=chance)  # of a huge one: half of them are none
    return torch.where(sign.abs() == 1, sign * 2.0**20, values).bfloat16()


class Combine:
    """Makes the call; check() looks at what it returned, once the kernels have run. The rows to combine are drawn, so
    they need no result of a dispatch. What lies between and behind them must not matter: it is no number.

    Args:
        seed: of rows, weights and biases.
        handle: of this rank.
        inputs, dispatched: of all ranks.
        buffer: built with ``allow_multiple_reduction=False``, so that it has room for either way.
    """

    def __init__(
        self,
        options: Options,
        seed: int,
        handle: deep_ep.EPHandle,
        inputs: list[oracle.Inputs],
        dispatched: list[oracle.Dispatched],
        buffer: deep_ep.ElasticBuffer,
        device: torch.device,
        hidden: int,
        *,
        with_weights: bool,
        num_biases: int,
        num_qps: int = 0,
    ) -> None:
        self.options, self.inputs, self.dispatched, self.with_weights = options, inputs, dispatched, with_weights
        self.rank, self.num_experts = buffer.rank_idx, handle.num_experts
        chance = torch.Generator().manual_seed(seed)
        weights = () if options.expanded else (inputs[0].topk_idx.shape[1],)
        counts = [len(self._places(rank)) for rank in range(buffer.num_ranks)]
        self.outputs = [rows_to_add(count, hidden, chance) for count in counts]
        self.out_weights = [torch.rand(count, *weights, generator=chance) for count in counts]
        self.biases = [[rows_to_add(len(own.topk_idx), hidden, chance) for _ in range(num_biases)] for own in inputs][
            self.rank
        ]

        handle.do_expand = options.expanded
        buffer.allow_multiple_reduction = options.multiple_reduction
        self.moment = timings.Moment(options.timing, device)
        self.combined, self.combined_weights, event = self._call(buffer, handle, device, num_qps)
        self.moment.began(event)

    def _call(
        self, buffer: deep_ep.ElasticBuffer, handle: deep_ep.EPHandle, device: torch.device, num_qps: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, deep_ep.EventOverlap]:
        """Nobody holds what is given to the call once this has returned."""
        rows = [self._padded(self.outputs[self.rank], handle), *self.biases]
        given = [with_gaps(each.to(device)) if self.options.row_gaps else each.to(device) for each in rows]
        weights = self._padded(self.out_weights[self.rank], handle).to(device) if self.with_weights else None
        homes: list[registered.Home | None] = []
        if self.options.zero_copy:
            homes = [None if each is None else registered.like(buffer, each) for each in (weights, given[0])]
        weights, x, *biases = self.moment.late(weights, *given, homes=homes)
        bias: Any = tuple(biases) if len(biases) == 2 else biases[0] if biases else None
        return buffer.combine(
            x,
            handle,
            topk_weights=weights,
            bias=bias,
            num_sms=self.options.num_sms,
            num_qps=num_qps,
            zero_copy=self.options.zero_copy,
            **self.moment.arguments(),
        )

    def _places(self, rank: int) -> torch.Tensor:
        """The rows that tokens have at a rank: those of which there are outputs, in their order."""
        there = self.dispatched[rank]
        if not self.options.expanded:
            return torch.arange(len(there.tokens))
        return torch.tensor([row for row, place in enumerate(there.expanded) if place is not None], dtype=torch.int64)

    def _padded(self, values: torch.Tensor, handle: deep_ep.EPHandle) -> torch.Tensor:
        """As many rows as the handle says, the values in their places."""
        allocated = handle.num_expanded_tokens if self.options.expanded else handle.num_recv_tokens
        padded = torch.full((allocated, *values.shape[1:]), torch.nan, dtype=values.dtype)
        padded[self._places(self.rank)] = values
        return padded

    def check(self) -> None:
        """Raises AssertionError, naming what differs."""
        self.moment.end()
        if self._lost_rows() and not self.options.multiple_reduction:
            return  # an owner cannot know which of its rows a rank has lost: it is enough that everybody ends
        sums, weights = self._expected()
        same("combined_x", self.combined, sums)
        if self.with_weights:
            assert self.combined_weights is not None
            same("combined_topk_weights", self.combined_weights, weights)
        else:
            assert self.combined_weights is None

    def _lost_rows(self) -> bool:
        """Experts that are named twice may need more rows of the expanded layout than there are."""
        return any(sum(there.per_expert) > len(self._places(rank)) for rank, there in enumerate(self.dispatched))

    def _expected(self) -> oracle.Plain:
        arguments = (self.rank, self.num_experts, self.biases)
        if not self.options.expanded:
            return oracle.combine(self.inputs, self.outputs, self.out_weights, self.dispatched, *arguments)
        # Outputs are there for the places that tokens have, so the oracle finds them by their numbers among those.
        dispatched = []
        for rank, there in enumerate(self.dispatched):
            metadata = there.metadata.clone()
            rows = metadata[:, 2:]
            rows[rows >= 0] = torch.searchsorted(self._places(rank), rows[rows >= 0].long()).int()
            dispatched.append(replace(there, metadata=metadata))
        if not self.options.multiple_reduction:
            return oracle.combine_every_row(self.inputs, self.outputs, self.out_weights, dispatched, *arguments)
        reduced = map(oracle.reduce_expanded, self.outputs, self.out_weights, dispatched)
        outputs, out_weights = map(list, zip(*reduced, strict=True))
        return oracle.combine(self.inputs, outputs, out_weights, dispatched, *arguments)
