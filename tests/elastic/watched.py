"""A buffer that notes which arguments its calls were given, so that none is forgotten in the tests."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from deep_ep import ElasticBuffer

CALLS = {"dispatch": ElasticBuffer.dispatch, "combine": ElasticBuffer.combine, "ElasticBuffer": ElasticBuffer.__init__}


class WatchedBuffer(ElasticBuffer):
    """Buffers of this class share their notes."""

    noted: set[tuple[str, str, bool]] = set()  # call, argument, whether it had its default

    def __init__(self, *args: Any, **named: Any) -> None:
        _note("ElasticBuffer", self, args, named)
        super().__init__(*args, **named)

    def dispatch(self, *args: Any, **named: Any) -> Any:
        _note("dispatch", self, args, named)
        return super().dispatch(*args, **named)

    def combine(self, *args: Any, **named: Any) -> Any:
        _note("combine", self, args, named)
        return super().combine(*args, **named)


def _note(call: str, buffer: WatchedBuffer, args: Any, named: Any) -> None:
    signature = inspect.signature(CALLS[call])
    bound = signature.bind(buffer, *args, **named)
    for name, parameter in signature.parameters.items():
        value = bound.arguments.get(name, parameter.default)
        is_default = type(value) is type(parameter.default) and value == parameter.default
        WatchedBuffer.noted.add((call, name, is_default))


def forgotten() -> Iterator[str]:
    """Arguments that were never given, or never left out where they may be."""
    for call, function in CALLS.items():
        for name, parameter in inspect.signature(function).parameters.items():
            may_be_left_out = parameter.default is not inspect.Parameter.empty
            if (call, name, False) not in WatchedBuffer.noted:
                yield f"{call} was never given {name}"
            if may_be_left_out and (call, name, True) not in WatchedBuffer.noted:
                yield f"{call} was never left without {name}"
