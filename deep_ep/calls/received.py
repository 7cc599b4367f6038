"""What a dispatch fills: outputs, and the routes that its handle keeps."""

from __future__ import annotations

from typing import NamedTuple

import torch

from deep_ep import plan
from deep_ep.handle import EPHandle
from deep_ep.ops.arguments import pointer
from deep_ep.ops.dispatch import Counts, Received


class Sizes(NamedTuple):
    """Rows that a dispatch fills at most."""

    tokens: int
    expanded: int  # of the expanded layout, padding included

    @staticmethod
    def worst(max_tokens: int, num_ranks: int, num_topk: int, local_experts: int, alignment: int) -> Sizes:
        """Every rank sends all it may."""
        expanded = plan.expanded_rows_at_most(max_tokens, num_ranks, num_topk, local_experts, alignment)
        return Sizes(num_ranks * max_tokens, expanded)


class RouteCounts(NamedTuple):
    """How many tokens go where: of a size that is known before they are."""

    per_rank: torch.Tensor  # [R] int32
    per_expert_aligned: torch.Tensor  # [L] int32
    per_expert_end: torch.Tensor  # [L] int32
    per_expert: torch.Tensor  # [L] int32
    number: torch.Tensor  # [1] int32

    @staticmethod
    def allocate(like: torch.Tensor, num_ranks: int, local_experts: int) -> RouteCounts:
        """In one piece. ``like``: a tensor of the device."""
        piece = like.new_empty(num_ranks + 3 * local_experts + 1, dtype=torch.int32)
        return RouteCounts(*piece.split_with_sizes([num_ranks, local_experts, local_experts, local_experts, 1]))

    @staticmethod
    def of(handle: EPHandle) -> RouteCounts:
        return RouteCounts(
            handle.psum_num_recv_tokens_per_scaleup_rank,
            handle.per_expert_aligned,
            handle.per_expert_end,
            handle.num_unaligned_recv_tokens_per_expert,
            handle.number,
        )

    def argument(self) -> Counts:
        return Counts(
            self.per_rank.data_ptr(),
            self.per_expert_aligned.data_ptr(),
            self.per_expert_end.data_ptr(),
            self.per_expert.data_ptr(),
            self.number.data_ptr(),
        )


class Beside(NamedTuple):
    """What a dispatch finds out about each row: little, compared with the rows. So it may be allocated before their
    number is known."""

    topk_idx: torch.Tensor | None  # [tokens, K]; None in the expanded layout
    weights: torch.Tensor | None  # float32: [tokens, K], or [expanded rows]
    metadata: torch.Tensor | None  # [tokens, K + 2] int32; None where a handle has it

    @staticmethod
    def allocate(
        topk_idx: torch.Tensor, weights: torch.Tensor | None, sizes: Sizes, *, expand: bool, metadata: bool
    ) -> Beside:
        """Room for what such tokens bring. The arguments: what goes out."""
        tokens, num_topk = sizes.tokens, topk_idx.shape[1]
        return Beside(
            None if expand else topk_idx.new_empty((tokens, num_topk)),
            None if weights is None else weights.new_empty(sizes.expanded if expand else (tokens, num_topk)),
            topk_idx.new_empty((tokens, num_topk + 2), dtype=torch.int32) if metadata else None,
        )

    def tell(self, received: Received) -> None:
        """Set the kernel's arguments to where they are."""
        received.topk_idx = pointer(self.topk_idx)
        received.weights = pointer(self.weights)
        received.metadata = pointer(self.metadata)

    def shrink(self, sizes: Sizes) -> None:
        """To what has come, in place; the memory stays as large as it was."""
        for tensor in self:
            if tensor is not None:
                rows = sizes.tokens if tensor.dim() > 1 else sizes.expanded
                tensor.resize_((rows, *tensor.shape[1:]))
