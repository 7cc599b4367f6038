"""deep_ep: dispatch and combine for expert-parallel mixture-of-experts layers, on GPUs and on simulated ranks."""

import importlib
from types import ModuleType

from deep_ep.ahead import precompile
from deep_ep.buffer import ElasticBuffer
from deep_ep.domains import get_logical_domain_size, get_physical_domain_size
from deep_ep.errors import EPCompileError, EPEnvironmentError, EPError, EPTimeoutError, EPTopologyError
from deep_ep.event import EventHandle, EventOverlap
from deep_ep.handle import EPHandle
from deep_ep.validate import topk_idx_t
from deep_ep.version import __version__


def __getattr__(name: str) -> ModuleType:
    """deep_ep.autograd, for who writes that without importing it; it registers operators of torch."""
    if name == "autograd":
        return importlib.import_module("deep_ep.autograd")
    raise AttributeError(f"module 'deep_ep' has no attribute {name!r}")


__all__ = [
    "EPCompileError",
    "EPEnvironmentError",
    "EPError",
    "EPHandle",
    "EPTimeoutError",
    "EPTopologyError",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "__version__",
    "get_logical_domain_size",
    "get_physical_domain_size",
    "precompile",
    "topk_idx_t",
]
