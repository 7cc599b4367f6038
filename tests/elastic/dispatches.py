"""One dispatch with all its options: what it is given, and that what it returns is the oracle's, to the bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import deep_ep
from tests import oracle
from tests.elastic import registered, timings
from tests.elastic.covering import Row


@dataclass(frozen=True)
class Options:
    """How one dispatch of a case differs from a plain one of bfloat16 rows.

    Attributes:
        hidden: values of a row.
        num_scales: scale factors of a row, which is FP8 then; 0 stands for bfloat16.
        packed: scale factors are int32, not float32.
        scale_strides: of the given ones; rows, columns or gaps.
        with_weights: whether weights travel.
        row_gaps: rows of x lie further apart than they are long.
        by_columns: selections and weights are stored so.
    """

    hidden: int
    with_weights: bool
    num_scales: int = 0
    packed: bool = False
    scale_strides: str = "rows"
    col_major_scales: bool = False
    do_expand: bool = False
    do_zero_padding: bool = False
    with_stats: bool = False
    row_gaps: bool = False
    by_columns: bool = False
    zero_copy: bool = False
    timing: timings.Timing = timings.AT_ONCE

    @staticmethod
    def of(row: Row, hidden: int, num_scales: int) -> Options:
        """As chosen (choices.py); sizes are the caller's."""
        do_expand, do_zero_padding = row["layout"]
        return Options(
            hidden,
            row["with_weights"],
            num_scales,
            packed=row["scales"] == "int32",
            scale_strides=row.get("scale_strides", "rows"),
            col_major_scales=row.get("col_major_scales", False),
            do_expand=do_expand,
            do_zero_padding=do_zero_padding,
            with_stats=row["with_stats"],
            row_gaps=row["row_gaps"],
            by_columns=row["by_columns"],
            zero_copy=row.get("zero_copy", False)
            and row["buffer"] == "settings"
            and num_scales % 4 == 0,  # whole 16 bytes
            timing=timings.Timing(
                row["previous_event"], row["before_epilogue"], row["asynchronous"], row["on_comm_stream"]
            ),
        )

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.int32 if self.packed else torch.float32

    def tensors(self, own: oracle.Inputs, device: torch.device) -> list[torch.Tensor | None]:
        """What dispatch takes: rows, scale factors, selections and weights, each with its strides."""
        x = own.x.to(device)
        idx, weights = own.topk_idx.to(device, deep_ep.topk_idx_t), own.weights.to(device)
        if self.by_columns:
            idx, weights = by_columns(idx), by_columns(weights)
        scales = own.scales.view(self.scale_dtype).to(device) if self.num_scales else None
        if scales is not None and self.scale_strides == "columns":
            scales = by_columns(scales)
        if scales is not None and self.scale_strides == "gaps":
            wide = torch.zeros(scales.shape[0], 3 * self.num_scales, dtype=scales.dtype, device=device)
            wide[:, ::3] = scales
            scales = wide[:, ::3]
        return [with_gaps(x) if self.row_gaps else x, scales, idx, weights if self.with_weights else None]


def by_columns(matrix: torch.Tensor) -> torch.Tensor:
    """The same matrix, stored column by column."""
    return matrix.t().contiguous().t()


def with_gaps(x: torch.Tensor) -> torch.Tensor:
    """The same matrix as a view whose rows lie 80 bytes further apart, with nothing but ones' bits between them."""
    size, rest = x.shape[1], 80 // x.element_size()
    wide = torch.full((x.shape[0], (size + rest) * x.element_size()), 255, dtype=torch.uint8, device=x.device)
    view = wide.view(x.dtype)[:, :size]
    view.copy_(x)
    return view


class Dispatch:
    """Makes the call; check() looks at what it returned, once the kernels have run.

    Args:
        options: of this call.
        inputs: of all ranks.
        expected: what the oracle says that this rank receives.
        allocated: rows that recv_x is to have.
        arguments: of the call, all the others.
    """

    def __init__(
        self,
        options: Options,
        inputs: list[oracle.Inputs],
        expected: oracle.Dispatched,
        buffer: deep_ep.ElasticBuffer,
        device: torch.device,
        allocated: int,
        **arguments: Any,
    ) -> None:
        self.options, self.inputs, self.expected, self.allocated = options, inputs, expected, allocated
        before = torch.arange(7, 7 + len(expected.per_expert), dtype=torch.int32)
        self.stats = before.to(device, copy=True) if options.with_stats else None
        self.expected_stats = before + torch.tensor(expected.per_expert, dtype=torch.int32)
        self.moment = timings.Moment(options.timing, device)
        self.recv_x, self.recv_idx, self.recv_weights, self.handle, event = self._call(buffer, device, arguments)
        self.moment.began(event)

    def _call(self, buffer: deep_ep.ElasticBuffer, device: torch.device, arguments: dict[str, Any]) -> Any:
        """Nobody holds what is given to the call once this has returned."""
        options = self.options
        x, scales, idx, weights = options.tensors(self.inputs[buffer.rank_idx], device)
        homes: list[registered.Home | None] = []
        if options.zero_copy:
            homes = [None if each is None else registered.like(buffer, each) for each in (x, scales)]
        if "handle" in arguments:  # which holds them
            idx = None
        # What comes late here must go into the call: what nobody holds might still be written when it is other memory.
        x, scales, idx, weights, self.stats = self.moment.late(x, scales, idx, weights, self.stats, homes=homes)
        return buffer.dispatch(
            x if scales is None else (x, scales),
            topk_idx=idx,
            topk_weights=weights,
            use_tma_aligned_col_major_sf=options.col_major_scales,
            cumulative_local_expert_recv_stats=self.stats,
            do_expand=options.do_expand,
            do_zero_padding=options.do_zero_padding,
            zero_copy=options.zero_copy,
            **self.moment.arguments(),
            **arguments,
        )

    def check(self) -> None:
        """Raises AssertionError, naming what differs."""
        self.moment.end()
        if self.stats is not None:
            same("cumulative_local_expert_recv_stats", self.stats, self.expected_stats)
        if self.options.do_expand:
            self._check_expanded()
            return
        expected, rows = self.expected, len(self.expected.tokens)
        self._check_payload(slice(rows), expected.x, expected.scales)
        assert self.recv_idx is not None
        same("recv_topk_idx", self.recv_idx[:rows], expected.topk_idx.to(deep_ep.topk_idx_t))
        assert bool((self.recv_idx[rows:] == -1).all()), "rows past the real count must say -1"
        if self.options.with_weights:
            assert self.recv_weights is not None
            same("recv_topk_weights", self.recv_weights[:rows], expected.weights)
        else:
            assert self.recv_weights is None

    def _check_expanded(self) -> None:
        """Every row whose (source, token, selection) the oracle names; padding if it was to be zeroed."""
        assert self.recv_idx is None
        places = self.expected.expanded
        used = [row for row, place in enumerate(places) if place is not None]
        padding = [row for row, place in enumerate(places) if place is None]
        tokens = [place[:2] for place in places if place is not None]
        weights = torch.tensor([self.inputs[place[0]].weights[place[1:]] for place in places if place is not None])
        row_of = {place: row for row, place in enumerate(self.expected.tokens)}
        plain = [row_of[token] for token in tokens]
        self._check_payload(used, self.expected.x[plain], self.expected.scales[plain])
        if self.options.with_weights:
            assert self.recv_weights is not None
            assert self.recv_weights.shape == (self.allocated,)
            same("recv_topk_weights", self.recv_weights[used], weights)
        else:
            assert self.recv_weights is None
        if self.options.do_zero_padding:
            zeros = [each.new_zeros(len(padding), each.shape[1]) for each in (self.expected.x, self.expected.scales)]
            self._check_payload(padding, *zeros)
            if self.recv_weights is not None:
                same("weights of padding", self.recv_weights[padding], torch.zeros(len(padding)))

    def _check_payload(self, rows: slice | list[int], x: torch.Tensor, scales: torch.Tensor) -> None:
        """Some of the rows and their scale factors; there is room for as many as there should be."""
        if not self.options.num_scales:
            assert isinstance(self.recv_x, torch.Tensor)
            assert self.recv_x.shape[0] == self.allocated
            same("recv_x", self.recv_x[rows], x)
            return
        recv_x, recv_scales = self.recv_x
        assert recv_x.shape[0] == recv_scales.shape[0] == self.allocated
        aligned = -(-self.allocated // 4) * 4
        strides = (1, aligned) if self.options.col_major_scales else (self.options.num_scales, 1)
        assert recv_scales.stride() == strides, f"recv_sf has strides {recv_scales.stride()}, not {strides}"
        same("recv_x", recv_x[rows], x)
        same("recv_sf", recv_scales[rows], scales.view(self.options.scale_dtype))


def check_handle(handle: deep_ep.EPHandle, expected: oracle.Dispatched, do_expand: bool, *, exact_sizes: bool) -> None:
    """What a handle says about the dispatch that made it, in the expanded layout or the plain one."""
    metadata = handle.recv_src_metadata
    same("recv_src_metadata", metadata[: len(expected.tokens)], expected.metadata)
    assert bool((metadata[len(expected.tokens) :] == -1).all()), "metadata past the real count"
    same_counts("psum by rank", handle.psum_num_recv_tokens_per_scaleup_rank, expected.per_rank)
    by_expert = expected.per_expert_end if do_expand else expected.per_expert_aligned
    same_counts("psum by expert", handle.psum_num_recv_tokens_per_expert, by_expert)
    same_counts("counts by expert", handle.num_unaligned_recv_tokens_per_expert, expected.per_expert)
    assert handle.num_recv_tokens_per_expert_list == (expected.aligned_list if exact_sizes else [])


def same_counts(what: str, got: torch.Tensor, expected: list[int]) -> None:
    same(what, got, torch.tensor(expected, dtype=torch.int32))


def same(what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise AssertionError, naming the first difference, unless both hold the same bits."""
    got = got.cpu()
    assert got.shape == expected.shape, f"{what} is {list(got.shape)}, expected {list(expected.shape)}"
    assert got.dtype == expected.dtype, f"{what} is {got.dtype}, expected {expected.dtype}"
    as_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    wrong = (got.view(as_bits) != expected.view(as_bits)).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        count = f"{len(wrong)} of {got.numel()} places"
        raise AssertionError(f"{what} differs in {count}, first at {at}: {got[at]}, expected {expected[at]}")
