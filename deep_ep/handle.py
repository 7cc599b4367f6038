"""What a dispatch leaves for its combine, for the backward pass and for reuse."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from deep_ep.event import Kept


class Seen(NamedTuple):
    """A handle's fields as they were when they were seen to be right, and its tensors."""

    fields: tuple[Any, ...]
    counts: list[int]  # a copy: a list may change and stay the same object
    kept: Kept


@dataclass
class EPHandle:
    """Where every token of one dispatch went. Only ``do_expand`` may be set by the caller.

    With R ranks, K selections a token, L local experts and N received tokens. After a dispatch with
    ``do_cpu_sync=False`` no host knows the counts: N is the worst case then, and what came is the last of
    ``psum_num_recv_tokens_per_scaleup_rank``. Tensors lie where the kernels run.
    """

    do_expand: bool
    """Whether combine takes rows of the expanded layout, as the last dispatch that made or used the handle returned."""
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    num_sms: int
    """SMs of the dispatch; combine takes the same unless told otherwise."""
    topk_idx: torch.Tensor
    """[T, K] topk_idx_t: the selections of this rank's tokens."""
    num_recv_tokens: int
    """Rows of recv_x in the plain layout. Without CPU sync the worst case, R x M, and not what came."""
    num_expanded_tokens: int
    """Rows of the expanded layout, padding included. Without CPU sync the worst case."""
    num_recv_tokens_per_expert_list: list[int]
    """[L] aligned counts; empty without CPU sync."""
    psum_num_recv_tokens_per_scaleup_rank: torch.Tensor
    """[R] int32, inclusive sums of received tokens by source rank."""
    psum_num_recv_tokens_per_expert: torch.Tensor
    """[L] int32. Plain: sums of aligned counts up to it. Expanded: where each expert's rows end, without padding."""
    num_unaligned_recv_tokens_per_expert: torch.Tensor
    """[L] int32, counts."""
    recv_src_metadata: torch.Tensor
    """[N, K+2] int32: global token index; source rank * K + last local selection; row of each selection in the expanded
    layout or -1."""
    dst_buffer_slot_idx: torch.Tensor
    """[T, K] int32: place of this token among those that this rank sends to the rank of the selection, or -1."""
    per_expert_aligned: torch.Tensor = field(repr=False)
    per_expert_end: torch.Tensor = field(repr=False)
    """[L] int32: psum_num_recv_tokens_per_expert of the plain and of the expanded layout."""
    number: torch.Tensor = field(repr=False)
    """[1] int32: which call of which buffer made it. Ranks compare it, so that all use the handle of one dispatch."""
    group_ranks: tuple[int, ...] = field(repr=False)
    """Global ranks of the group; a buffer of another group refuses the handle."""
    rank: int = field(repr=False)
    _seen: Seen | None = field(default=None, init=False, repr=False, compare=False)

    def turn_to(self, do_expand: bool) -> None:
        """A dispatch has used the handle for this layout: what depends on it follows."""
        self.do_expand = do_expand
        self.psum_num_recv_tokens_per_expert = self.per_expert_end if do_expand else self.per_expert_aligned

    @property
    def num_topk(self) -> int:
        return int(self.topk_idx.shape[1])

    def remember(self, kept: Kept | None = None) -> None:
        """What calls go by is right as it is now, and need not be looked at again before somebody sets it.

        Args:
            kept: the tensors, if fewer hold all their memory, or if a stream was told of them.
        """
        fields = _FIELDS(self)
        if kept is None:
            kept = Kept([field for field in fields if isinstance(field, torch.Tensor)])
        self._seen = Seen(fields, list(self.num_recv_tokens_per_expert_list), kept)

    @property
    def is_as_seen(self) -> bool:
        """Whether what calls go by is what remember() saw: the same objects, and the same counts."""
        seen = self._seen
        return (
            seen is not None
            and all(map(operator.is_, seen.fields, _FIELDS(self)))
            and seen.counts == self.num_recv_tokens_per_expert_list
            and (
                self.psum_num_recv_tokens_per_expert is self.per_expert_aligned
                or self.psum_num_recv_tokens_per_expert is self.per_expert_end
            )
        )

    @property
    def kept(self) -> Kept:
        """Its tensors, of a handle that was seen to be right."""
        assert self._seen is not None
        return self._seen.kept

    def __getstate__(self) -> dict[str, Any]:
        """Without what was seen: a copy has other tensors."""
        return {**vars(self), "_seen": None}


# What calls go by, but for do_expand, which may change. psum_num_recv_tokens_per_expert is one of two that are here.
_FIELDS = operator.attrgetter(
    "num_experts",
    "expert_alignment",
    "num_max_tokens_per_rank",
    "num_recv_tokens",
    "num_expanded_tokens",
    "num_recv_tokens_per_expert_list",
    "topk_idx",
    "dst_buffer_slot_idx",
    "recv_src_metadata",
    "psum_num_recv_tokens_per_scaleup_rank",
    "per_expert_aligned",
    "per_expert_end",
    "num_unaligned_recv_tokens_per_expert",
    "number",
    "group_ranks",
)
