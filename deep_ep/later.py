"""Methods of the interface that are not there yet: calling one says so, and names it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NoReturn

STATIC = (
    "get_engram_storage_size_hint",
    "get_pp_buffer_size_hint",
    "get_agrs_num_max_session_bytes",
    "get_agrs_buffer_size_hint",
)
OTHERS = re.compile(r"engram_\w+|pp_\w+|\w*agrs\w*|all_gather")


def not_yet(name: str) -> Callable[..., NoReturn]:
    """A function that raises NotImplementedError, whatever it is given."""

    def method(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"ElasticBuffer.{name} is not there yet; README.md, 'What works today', says what is")

    return method


class Later:
    """What ElasticBuffer has of them."""

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if OTHERS.fullmatch(name):
            return not_yet(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


for _name in STATIC:
    setattr(Later, _name, staticmethod(not_yet(_name)))
