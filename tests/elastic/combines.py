"""One combine with all its options: what it is given, and that what it returns is the oracle's, to the bit."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch

import deep_ep
from tests import oracle
from tests.elastic.dispatches import same


@dataclass(frozen=True)
class Options:
    """How one combine of a case differs from a plain one.

    Attributes:
        expanded: rows have the expanded layout.
        multiple_reduction: those of a token are added on their rank first.
    """

    expanded: bool = False
    multiple_reduction: bool = True

    @staticmethod
    def draw(r: random.Random) -> Options:
        return Options(expanded=r.random() < 0.5, multiple_reduction=r.random() < 0.5)


PLAIN = Options()


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
    ) -> None:
        self.options, self.inputs, self.dispatched, self.with_weights = options, inputs, dispatched, with_weights
        self.rank, self.num_experts = buffer.rank_idx, handle.num_experts
        chance = torch.Generator().manual_seed(seed)
        weights = () if options.expanded else (inputs[0].topk_idx.shape[1],)
        counts = [len(self._places(rank)) for rank in range(buffer.num_ranks)]
        self.outputs = [torch.randn(count, hidden, generator=chance).bfloat16() for count in counts]
        self.out_weights = [torch.rand(count, *weights, generator=chance) for count in counts]
        self.biases = [
            [torch.randn(len(own.topk_idx), hidden, generator=chance).bfloat16() for _ in range(num_biases)]
            for own in inputs
        ][self.rank]

        handle.do_expand = options.expanded
        buffer.allow_multiple_reduction = options.multiple_reduction
        given = [bias.to(device) for bias in self.biases]
        self.combined, self.combined_weights, _ = buffer.combine(
            self._padded(self.outputs[self.rank], handle).to(device),
            handle,
            topk_weights=self._padded(self.out_weights[self.rank], handle).to(device) if with_weights else None,
            bias=given if len(given) == 2 else given[0] if given else None,
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
