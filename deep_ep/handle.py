"""What a dispatch leaves for its combine, for the backward pass and for reuse."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch

from deep_ep.event import Kept


@dataclass(init=False, eq=False)
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
    """SMs of the dispatch."""
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
    layout or -1. Rows past the last token, which there are only without CPU sync, are -1."""
    dst_buffer_slot_idx: torch.Tensor
    """[T, K] int32: place of this token among those that this rank sends to the rank of the selection, or -1."""
    per_expert_aligned: torch.Tensor = field(repr=False)
    per_expert_end: torch.Tensor = field(repr=False)
    """[L] int32: psum_num_recv_tokens_per_expert of the plain and of the expanded layout."""
    number: torch.Tensor = field(repr=False)
    """[1] int32: which call of which buffer made it. Ranks compare it, so that all use the handle of one dispatch."""
    told_num_sms: int = field(repr=False)
    """What that dispatch was told, and combine takes too unless it is told otherwise; 0: nothing."""
    group_ranks: tuple[int, ...] = field(repr=False)
    """Global ranks of the group; a buffer of another group refuses the handle."""
    rank: int = field(repr=False)
    _kept: Kept | None = field(default=None, repr=False)
    """Its tensors, once it was seen to be right. Nobody can set it, so it stays so."""

    def __init__(self, **values: Any) -> None:
        """Every field by name. The package alone makes handles, one in most calls."""
        self._set(**values)
        self._set(_kept=None)  # also where the values are those of another handle

    def _set(self, **values: Any) -> None:
        """Past __setattr__, and as torch.compile can follow it: that of torch 2.11 knows no __dict__.update()."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED:
            raise AttributeError(f"{name} of an EPHandle cannot be set: it says what a dispatch did; do_expand can be")
        object.__setattr__(self, name, value)

    def turn_to(self, do_expand: bool) -> None:
        """A dispatch has used the handle for this layout: what depends on it follows."""
        ends = self.per_expert_end if do_expand else self.per_expert_aligned
        if self.do_expand is not do_expand or self.psum_num_recv_tokens_per_expert is not ends:
            self._set(do_expand=do_expand, psum_num_recv_tokens_per_expert=ends)

    def hold(self, num_recv_tokens: int, num_expanded_tokens: int, selections: list[int]) -> None:
        """Its dispatch has brought so many, which nobody knew when it was made."""
        self._set(
            num_recv_tokens=num_recv_tokens,
            num_expanded_tokens=num_expanded_tokens,
            num_recv_tokens_per_expert_list=selections,
        )

    @property
    def num_topk(self) -> int:
        return int(self.topk_idx.shape[1])

    def remember(self, kept: Kept | None = None) -> None:
        """It is right, and need not be looked at again.

        Args:
            kept: its tensors, if fewer hold all their memory, or if a stream was told of them.
        """
        if kept is None:
            kept = Kept([value for value in vars(self).values() if isinstance(value, torch.Tensor)])
        self._set(_kept=kept)

    @property
    def is_known(self) -> bool:
        """Whether remember() was called."""
        return self._kept is not None

    @property
    def kept(self) -> Kept:
        """The tensors of one that is known."""
        assert self._kept is not None
        return self._kept

    def __getstate__(self) -> dict[str, Any]:
        """A copy has other tensors."""
        return {**vars(self), "_kept": None}


_FIXED = frozenset(each.name for each in fields(EPHandle)) - {"do_expand"}
