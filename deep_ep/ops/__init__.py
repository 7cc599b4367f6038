"""One file a kernel: its config, its arguments and its launch shape."""

from __future__ import annotations

from deep_ep.jit import Kernel
from deep_ep.ops.barrier import BARRIER
from deep_ep.ops.combine import Return, combine_kernel
from deep_ep.ops.dispatch import PlacesFrom, dispatch_kernel
from deep_ep.plan import ROLES


def all_kernels(machine: str = "cuda") -> list[Kernel]:
    """Every kernel that a buffer may launch on a kind of machine ("cuda" or "simulated"): what to compile ahead."""
    roles = ROLES[machine]
    dispatches = [dispatch_kernel(roles.dispatch, places_from) for places_from in PlacesFrom]
    return [*dispatches, *(combine_kernel(roles, returned) for returned in Return), BARRIER]
