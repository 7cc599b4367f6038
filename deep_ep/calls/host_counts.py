"""Counts of a dispatch that come to the host before the tokens do."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from deep_ep import layout

FIRST_COUNT = 2  # words before the experts' counts: whether they are there, rows


class Told(NamedTuple):
    """What a rank will receive."""

    rows: int  # tokens
    selections: np.ndarray[Any, Any]  # [L], of each local expert, aligned
    num_selections: int  # of all


class HostCounts:
    """The words in which a kernel reports them.

    Args:
        words: a machine's (Machine.host_words), num_words() of them.
    """

    def __init__(self, words: Any) -> None:
        self._words = words

    @staticmethod
    def num_words(num_ranks: int) -> int:
        return FIRST_COUNT + layout.MAX_EXPERTS // num_ranks

    def expect(self) -> int:
        """Forget the last call's; returns the address to which a kernel writes this call's."""
        self._numbers()[0] = 0
        address: int = self._words.address
        return address

    def have_come(self) -> bool:
        return bool(self._numbers()[0] != 0)

    def read(self, local_experts: int, alignment: int) -> Told:
        """Those that have come."""
        numbers = self._numbers()
        selections = numbers[FIRST_COUNT : FIRST_COUNT + local_experts]
        selections = -(-selections // alignment) * alignment
        return Told(int(numbers[1]), selections, int(selections.sum()))

    def _numbers(self) -> np.ndarray[Any, Any]:
        """They change under whoever has them. NumPy takes a tenth of torch's time."""
        numbers: np.ndarray[Any, Any] = self._words.tensor.numpy()
        return numbers
