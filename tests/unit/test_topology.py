"""Ranks as scale-out x scale-up."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deep_ep.errors import EPTopologyError
from deep_ep.topology import Topology, require_one_domain


@given(num_domains=st.integers(1, 8), domain=st.integers(1, 16), data=st.data())
def test_every_rank_has_one_place(num_domains: int, domain: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, num_domains * domain - 1))
    topology = Topology(num_domains * domain, rank, domain)
    assert topology.num_scaleout_ranks == num_domains
    assert 0 <= topology.scaleout_rank < num_domains
    assert 0 <= topology.scaleup_rank < domain
    assert topology.scaleout_rank * domain + topology.scaleup_rank == rank


@pytest.mark.parametrize("rank", [-1, 4])
def test_rank_outside_the_group(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank must be 0 to 3, but it is {rank}"):
        Topology(4, rank, 4)


@pytest.mark.parametrize("domain", [0, 4])
def test_domains_of_different_sizes(domain: int) -> None:
    with pytest.raises(EPTopologyError, match=f"6 ranks do not divide into NVLink domains of {domain}"):
        Topology(6, 0, domain)


def test_one_domain() -> None:
    require_one_domain(Topology(32, 31, 32), max_ranks=32)
    with pytest.raises(EPTopologyError, match=re.escape("at most 8 ranks of one domain")):
        require_one_domain(Topology(16, 0, 8), max_ranks=32)
    with pytest.raises(EPTopologyError, match="33 ranks, this version serves at most 32"):
        require_one_domain(Topology(33, 0, 33), max_ranks=32)
