"""Names that frameworks import from here, and helpers that go with the calls."""

from deep_ep.event import EventHandle, EventOverlap
from deep_ep.fp8 import per_token_cast_back, per_token_cast_to_fp8

__all__ = ["EventHandle", "EventOverlap", "per_token_cast_back", "per_token_cast_to_fp8"]
