"""Registered memory: tensors that peers read where they lie, so that nobody has to send them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from deep_ep import layout, validate
from deep_ep.ops.arguments import InPlace

WORD_BYTES = 4  # in which kernels tell each other where rows lie
MOST_BYTES = WORD_BYTES << 32  # so far do such words reach
COPIED_BYTES = 16  # what the copy engine moves at least


class Registered:
    """A buffer's registered memory on this rank. It is handed out piece by piece, and never taken back."""

    def __init__(self, memory: torch.Tensor) -> None:
        """``memory``: [bytes] uint8."""
        self._memory = memory
        self._base = memory.data_ptr()  # for peers it stays there, whatever torch does to a tensor
        self._used = 0

    def forget(self) -> None:
        """Let go of it, so that it can be given back once nobody holds a tensor of it."""
        self._memory = self._memory.new_empty(0)

    def empty(self, size: Any, dtype: Any) -> torch.Tensor:
        """
        Raises:
            ValueError, TypeError: not a size or a dtype, or more than there is left.
        """
        if not isinstance(size, Sequence):
            raise TypeError(f"size must be a sequence of lengths, but it is {size!r:.80}")
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, but it is {dtype!r:.80}")
        lengths = [validate.is_count(f"size[{i}]", length, 0) for i, length in enumerate(size)]
        num_bytes = math.prod(lengths) * dtype.itemsize
        total, left = self._memory.numel(), self._memory.numel() - self._used
        if num_bytes > left:
            raise ValueError(
                f"a registered tensor {lengths} of {dtype} takes {num_bytes} bytes, but of the buffer's "
                f"num_registered_bytes={total} only {left} are left; build the buffer with more on every rank, and "
                "make such tensors once, not in each call"
            )
        piece = self._memory[self._used : self._used + num_bytes]
        self._used = min(total, layout.align(self._used + num_bytes, layout.REGION_ALIGNMENT))
        return piece.view(dtype).view(lengths)

    def place(self, rows: tuple[str, torch.Tensor], beside: tuple[str, torch.Tensor | None]) -> InPlace:
        """Where rows, and what goes beside them, lie for a kernel; each with the name of its argument.

        Raises:
            ValueError: one is not in registered memory, or has gaps.
        """
        name, x = rows
        told = InPlace(rows=self._word(name, x), row_words=x.shape[1] * x.element_size() // WORD_BYTES)
        name, other = beside
        if other is not None:
            told.beside, told.beside_words = self._word(name, other), other.shape[1]
        return told

    def _word(self, name: str, tensor: torch.Tensor) -> int:
        if not self._memory.numel():
            raise ValueError("zero_copy takes registered memory: build the buffer with num_registered_bytes")
        offset = tensor.data_ptr() - self._base
        num_bytes = tensor.numel() * tensor.element_size()
        if num_bytes and not 0 <= offset <= self._memory.numel() - num_bytes:
            if self._memory.data_ptr() != self._base:
                raise ValueError(
                    f"{name} is not in this buffer's registered memory any more: resize_() of a registered tensor has "
                    "moved all of them; build a new buffer, and do not make registered tensors larger"
                )
            raise ValueError(
                f"{name} must lie in this buffer's registered memory for zero_copy; make it with "
                "buffer.registered_empty(), or leave zero_copy out"
            )
        if not tensor.is_contiguous() or (num_bytes and offset % COPIED_BYTES):
            raise ValueError(
                f"{name} must be contiguous and start at a multiple of {COPIED_BYTES} bytes for zero_copy, but its "
                f"strides are {tensor.stride()} for a shape of {list(tensor.shape)}, and it starts at byte {offset}"
            )
        return offset // WORD_BYTES if num_bytes else 0
