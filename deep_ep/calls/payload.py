"""What a dispatch carries for each token: a row of bytes, and scale factors where rows are quantised.

Kernels move both and look into neither, so another format is another dtype here and nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from deep_ep.layout import align

TMA_ALIGNMENT = 4  # rows: columns of scale factors start at multiples of 16 bytes


class Payload(NamedTuple):
    """Rows of tokens, and of each its scale factors."""

    rows: torch.Tensor  # [T, H]
    scales: torch.Tensor | None  # [T, P] of 4-byte elements, any strides

    @property
    def as_given(self) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As the interface has it: a tensor, or a pair."""
        return self.rows if self.scales is None else (self.rows, self.scales)

    @property
    def row_bytes(self) -> int:
        return self.rows.shape[1] * self.rows.element_size()

    @property
    def num_scales(self) -> int:
        """Of a token."""
        return 0 if self.scales is None else self.scales.shape[1]

    def new_empty(self, num_rows: int, *, col_major_scales: bool) -> Payload:
        """Room for ``num_rows`` such rows. Scale factors are row-major, or have strides (1, num_rows aligned to 4)."""
        rows = self.rows.new_empty((num_rows, self.rows.shape[1]))
        if self.scales is None:
            return Payload(rows, None)
        num_scales = self.scales.shape[1]
        if not col_major_scales:
            return Payload(rows, self.scales.new_empty((num_rows, num_scales)))
        aligned = align(num_rows, TMA_ALIGNMENT)
        columns = self.scales.new_empty(num_scales * aligned)
        return Payload(rows, columns.as_strided((num_rows, num_scales), (1, aligned)))
