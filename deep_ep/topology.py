"""Ranks as scale-out x scale-up: which peers a rank reaches by load and store, and which only over the network."""

from __future__ import annotations

from dataclasses import dataclass

from deep_ep.errors import EPTopologyError


@dataclass(frozen=True)
class Topology:
    """Where a rank stands; ``rank = scaleout_rank * num_scaleup_ranks + scaleup_rank``."""

    num_ranks: int
    rank: int
    num_scaleup_ranks: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.num_ranks:
            raise ValueError(f"rank must be 0 to {self.num_ranks - 1}, but it is {self.rank}")
        if self.num_scaleup_ranks < 1 or self.num_ranks % self.num_scaleup_ranks:
            raise EPTopologyError(
                f"{self.num_ranks} ranks do not divide into NVLink domains of {self.num_scaleup_ranks}; "
                "use a group with the same number of ranks in every domain"
            )

    @property
    def num_scaleout_ranks(self) -> int:
        return self.num_ranks // self.num_scaleup_ranks

    @property
    def scaleout_rank(self) -> int:
        return self.rank // self.num_scaleup_ranks

    @property
    def scaleup_rank(self) -> int:
        return self.rank % self.num_scaleup_ranks


def require_one_domain(topology: Topology, max_ranks: int) -> None:
    """Raise unless all ranks share one NVLink domain that this version's kernels can serve."""
    if topology.num_scaleout_ranks > 1:
        raise EPTopologyError(
            f"{topology.num_ranks} ranks lie in {topology.num_scaleout_ranks} NVLink domains; this version's kernels "
            f"stay inside one: use a group of at most {topology.num_scaleup_ranks} ranks of one domain"
        )
    if topology.num_ranks > max_ranks:
        raise EPTopologyError(f"the group has {topology.num_ranks} ranks, this version serves at most {max_ranks}")
