"""What a dispatch fills: outputs, and the routes that its handle keeps."""

from __future__ import annotations

from typing import NamedTuple

import torch

from deep_ep import plan
from deep_ep.calls.endpoint import Tensors
from deep_ep.calls.payload import Payload
from deep_ep.handle import EPHandle
from deep_ep.ops.arguments import pointer
from deep_ep.ops.dispatch import Counts, Received, Scales


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


class Outputs(NamedTuple):
    """What a dispatch returns: ``rows`` are tokens, or rows of the expanded layout."""

    payload: Payload  # [rows, H]
    topk_idx: torch.Tensor | None  # [tokens, K]; None in the expanded layout
    weights: torch.Tensor | None  # float32: [tokens, K], or [rows] in the expanded layout
    metadata: torch.Tensor | None  # int32: [tokens, K + 2]; None where a handle has it

    @property
    def without_metadata(self) -> Tensors:
        return *self.payload, self.topk_idx, self.weights

    @property
    def tensors(self) -> Tensors:
        return *self.without_metadata, self.metadata

    def tell(self, received: Received, sizes: Sizes) -> None:
        """Set the kernel's arguments to where they are; the plan knows the layout."""
        received.x = self.payload.rows.data_ptr()
        received.topk_idx = pointer(self.topk_idx)
        received.weights = pointer(self.weights)
        received.metadata = pointer(self.metadata)
        received.rows, received.expanded_rows = sizes
        if self.payload.scales is not None:
            received.scales = Scales.of(self.payload.scales)

    def shrink(self, tokens: int, rows: int) -> None:
        """To the first ones, in place; the memory stays as large as it was. Scale factors are row-major."""
        for tensor, count in (
            (self.payload.rows, rows),
            (self.payload.scales, rows),
            (self.topk_idx, tokens),
            (self.weights, rows),
            (self.metadata, tokens),
        ):
            if tensor is not None:
                tensor.resize_((count, *tensor.shape[1:]))
