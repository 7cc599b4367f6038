"""Names that frameworks import from here."""

from deep_ep.event import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
