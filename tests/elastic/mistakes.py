"""What bad_calls.py is made of: good arguments, and calls that differ from them in one place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from deep_ep import ElasticBuffer

NUM_RANKS, TOKENS, HIDDEN, TOPK, EXPERTS, MOST = 2, 6, 64, 3, 8, 32


@dataclass(frozen=True)
class Mistake:
    """A wrong call, and what it must be told."""

    call: Callable[[], Any]
    change: str
    kind: type[Exception]
    text: str

    def complaint(self) -> str | None:
        """What is wrong with the answer; None if it is as it must be."""
        try:
            self.call()
        except self.kind as error:
            return None if self.text in str(error) else f"{self.change}: {self.text!r} is not in {str(error)!r}"
        except Exception as error:
            return f"{self.change}: {type(error).__name__} ({error}), not {self.kind.__name__}"
        return f"{self.change}: was accepted"


class Table:
    """Good arguments, and calls that differ from them in one place."""

    def __init__(self, buffer: ElasticBuffer, device: torch.device) -> None:
        self.buffer, self.device = buffer, device
        self.x = self.bf16(TOKENS, HIDDEN)
        self.topk_idx = torch.tensor([[0, 1, 5], [2, -1, 7], [-1, -1, -1], [7, 6, 5], [3, 4, -1], [1, 0, 2]])
        self.topk_idx = self.topk_idx.to(device)
        self.weights = torch.rand(TOKENS, TOPK, device=device)
        self.recv_x, _, self.recv_weights, self.handle, _ = self.dispatch()
        self.rows = self.recv_x.shape[0]

    def bf16(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16, device=self.device)

    def dispatch(self, **changes: Any) -> Any:
        good = {"x": self.x, "topk_idx": self.topk_idx, "topk_weights": self.weights, "num_experts": EXPERTS}
        return self.buffer.dispatch(**{**good, **changes})

    def combine(self, **changes: Any) -> Any:
        good = {"x": self.recv_x, "handle": self.handle, "topk_weights": self.recv_weights}
        return self.buffer.combine(**{**good, **changes})

    def mistake(self, kind: type[Exception], text: str, **changes: Any) -> Mistake:
        """A dispatch."""
        return Mistake(functools.partial(self.dispatch, **changes), f"dispatch({brief(changes)})", kind, text)

    def again(self, kind: type[Exception], text: str, **changes: Any) -> Mistake:
        """A dispatch with a handle."""
        return self.mistake(kind, text, **{"handle": self.handle, "topk_idx": None, **changes})

    def combining(self, kind: type[Exception], text: str, **changes: Any) -> Mistake:
        return Mistake(functools.partial(self.combine, **changes), f"combine({brief(changes)})", kind, text)

    def building(self, kind: type[Exception], text: str, **changes: Any) -> Mistake:
        good = {"group": self.buffer.group, "num_max_tokens_per_rank": MOST, "hidden": HIDDEN}
        return Mistake(lambda: ElasticBuffer(**{**good, **changes}), f"ElasticBuffer({brief(changes)})", kind, text)


def brief(changes: dict[str, Any]) -> str:
    """The changed arguments in a few words."""

    def show(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{list(value.shape)} {value.dtype} on {value.device}, strides {value.stride()}"
        return repr(value)[:60]

    return ", ".join(f"{name}={show(value)}" for name, value in changes.items())
