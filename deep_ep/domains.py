"""What can be asked of a group without building a buffer over it."""

from __future__ import annotations

import torch.distributed as dist

from deep_ep.machine import backends_of


def size_of(group: object) -> int:
    """Ranks of a group that this rank belongs to.

    Raises:
        ValueError, TypeError: it is no such group.
    """
    backends_of(group)
    assert isinstance(group, dist.ProcessGroup)  # or the line above has raised
    return group.size()


def get_physical_domain_size(group: dist.ProcessGroup) -> tuple[int, int]:
    """(RDMA ranks, NVLink ranks): how a buffer's ranks are connected. Talks to nobody.

    This version serves groups inside one NVLink domain, so it is (1, ranks); building a buffer over any other group is
    an EPTopologyError.
    """
    return 1, size_of(group)


def get_logical_domain_size(group: dist.ProcessGroup, allow_hybrid_mode: bool = True) -> tuple[int, int]:
    """(scale-out ranks, scale-up ranks): how kernels use the group. Inside one NVLink domain (1, ranks), whether
    ``allow_hybrid_mode`` or not."""
    return get_physical_domain_size(group)
