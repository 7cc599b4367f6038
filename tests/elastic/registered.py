"""Registered memory for the calls of a test: a ring of it, since a buffer hands its own out only once."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

from deep_ep import ElasticBuffer

NUM_BYTES = 48 << 20  # of a buffer that makes one call after the other
LINE = 128


@dataclass(frozen=True)
class Home:
    """A tensor in registered memory, where the values of one call lie after those of another.

    Attributes:
        tensor: what the call is given.
    """

    buffer: ElasticBuffer
    tensor: torch.Tensor

    def write(self, values: torch.Tensor) -> None:
        """In the order of the buffer's calls: on a GPU that of the current stream."""
        in_order = getattr(self.buffer, "write_in_order", None)  # tests/sim/ranks.py, where calls may not have run yet
        if in_order is None:
            self.tensor.copy_(values)
        else:
            in_order(self.tensor, values)


class _Ring:
    def __init__(self, buffer: ElasticBuffer) -> None:
        num_bytes = buffer._end().layout["registered"].num_bytes
        self._memory = buffer.registered_empty([num_bytes], torch.uint8)
        self._next = 0

    def take(self, num_bytes: int) -> torch.Tensor:
        if self._next + num_bytes > self._memory.numel():
            self._next = 0
        begin, self._next = self._next, -(-(self._next + num_bytes) // LINE) * LINE
        assert begin + num_bytes <= self._memory.numel(), f"{num_bytes} bytes are more than the buffer has registered"
        return self._memory[begin : begin + num_bytes]


_RINGS: weakref.WeakKeyDictionary[ElasticBuffer, _Ring] = weakref.WeakKeyDictionary()


def is_in(buffer: ElasticBuffer) -> bool:
    """Whether the buffer has any."""
    return buffer._end().layout["registered"].num_bytes > 0


def like(buffer: ElasticBuffer, tensor: torch.Tensor) -> Home:
    """A contiguous tensor of the same shape in the buffer's registered memory; another one in each call, until its
    memory is taken anew."""
    if buffer not in _RINGS:
        _RINGS[buffer] = _Ring(buffer)
    memory = _RINGS[buffer].take(tensor.numel() * tensor.element_size())
    return Home(buffer, memory.view(tensor.dtype).view(tensor.shape))
