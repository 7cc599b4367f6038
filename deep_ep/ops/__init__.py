"""One file a kernel: its config, its arguments and its launch shape."""

from __future__ import annotations

from deep_ep.jit import Kernel
from deep_ep.ops.barrier import BARRIER
from deep_ep.ops.combine import Return, combine_kernel
from deep_ep.ops.dispatch import PlacesFrom, dispatch_kernel
from deep_ep.plan import ROLES


def all_kernels(machine: str = "cuda", in_place: bool = True) -> list[Kernel]:
    """Every kernel that a buffer may launch on a kind of machine ("cuda" or "simulated"): what to compile ahead.

    Args:
        in_place: those too that only a buffer with registered memory launches.
    """
    roles, ways = ROLES[machine], (False, True) if in_place else (False,)
    dispatches = [dispatch_kernel(roles.dispatch, places_from, way) for way in ways for places_from in PlacesFrom]
    combines = [combine_kernel(roles, returned) for returned in Return if in_place or returned is not Return.IN_PLACE]
    return [*dispatches, *combines, BARRIER]
