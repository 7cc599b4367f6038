"""Ranks die; or the one that hosts simulated ranks lets its buffer go before its peers do, or a child does so."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from deep_ep.machine import host
from deep_ep.machine.simulated import SimulatedMachine
from tests.unit.test_machine_simulated import LIMITS, Rank, ended, error_of, run_ranks, world_of


def a_rank_leaves() -> None:
    """Those who came are served alone, at once: nobody else is left to wait for."""
    rank = Rank(dist.group.WORLD)
    if rank.machine.rank == 2:
        os._exit(0)
    start = time.monotonic()
    rank.launch()  # kernels find out themselves, in virtual time
    assert time.monotonic() - start < LIMITS.kernel_s
    if rank.machine.rank == 0:
        assert world_of(rank).patience == ["expire"]
    text = error_of(rank.launch)
    assert text.startswith(
        "EPError: these simulated ranks cannot go on: a launch of shift has gone on without rank 2 (has destroyed"
    ), text
    end_without_the_lost(rank.machine, lost=2)


def end_without_the_lost(machine: SimulatedMachine, lost: int) -> None:
    text = error_of(lambda: machine.meet("to end", 0.2))
    assert f"for ranks [{lost}] of the group to end" in text, text
    if machine.rank == 0:
        time.sleep(0.5)  # it has the store
    os._exit(0)  # the group is broken; nothing can be destroyed in good order


def the_host_dies() -> None:
    rank = Rank(dist.group.WORLD)
    if rank.machine.rank == 0:
        time.sleep(0.5)
        os._exit(0)
    text = error_of(rank.launch)
    assert text.startswith("EPError: rank 0 of the group, which hosts the simulated ranks, has destroyed or dropped"), (
        text
    )
    assert "while this one was in a launch of shift" in text, text
    assert "this machine cannot be used any more" in error_of(rank.launch)
    os._exit(0)  # the store was rank 0's too


def the_host_has_finished() -> None:
    """Rank 0 lets its machine go as soon as its own calls have returned; its peers' calls have not."""
    rank = Rank(dist.group.WORLD)
    rank.launch()
    if rank.machine.rank == 0:
        assert rank.machine._host is not None
        assert not os.path.exists(os.path.dirname(rank.machine._host.address)), "nothing is left if it is killed now"
        world = world_of(rank)
        del rank
        dist.barrier()
        assert not world.num_closed, "no peer has hung up yet"
        dist.barrier()  # now they may
        dist.barrier()
        ended(world)
        return
    dist.barrier()
    dist.barrier()
    rank.launch(alone=True)
    text = error_of(lambda: rank.machine.allocate_window(8))
    assert text.startswith("EPTimeoutError: allocate_window has gone on without rank 0 (has destroyed or dropped"), text
    rank.machine.close()
    dist.barrier()


def the_host_leaves_a_call() -> None:
    """Who waits for rank 0 is served without it, as soon as the others have come."""
    rank = Rank(dist.group.WORLD)
    if rank.machine.rank == 0:
        time.sleep(0.5)
        rank.machine.close()
    elif rank.machine.rank == 1:
        start = time.monotonic()
        rank.launch()
        assert time.monotonic() - start < LIMITS.kernel_s
        assert rank.machine.gone == {0: "has destroyed or dropped its buffer, or died"}
    else:
        time.sleep(1)
        rank.launch()
    dist.barrier()


def the_host_cannot_stay() -> None:
    """Who waits for somebody else when it must end is served alone; who comes later finds nobody."""
    rank = Rank(dist.group.WORLD)
    if rank.machine.rank == 0:
        time.sleep(0.5)
        rank.machine.close()
        assert rank.machine._host is not None
        rank.machine._host.leave(0.5)
    elif rank.machine.rank == 1:
        rank.launch()
        assert rank.machine.gone == {0: "has destroyed or dropped its buffer, or died"}
    else:
        time.sleep(3)
        text = error_of(rank.launch)
        assert text.startswith("EPError: rank 0 of the group, which hosts the simulated ranks, has destroyed or"), text
    dist.barrier()


def a_child_forgets_its_machine() -> None:
    """A forked child has a copy of all this, and none of it is its own."""
    rank = Rank(dist.group.WORLD)
    child = os.fork()
    if child == 0:
        rank.machine.close()
        del rank
        gc.collect()
        host._leave_peers()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    dist.barrier()
    rank.launch()
    rank.machine.meet("to end")
    rank.machine.close(together=True)
    assert rank.machine.rank or world_of(rank).num_closed == 1


def all_of_them() -> None:
    """One after the other in the same processes, which take seconds to start."""
    for scenario in (the_host_has_finished, the_host_leaves_a_call, the_host_cannot_stay, a_child_forgets_its_machine):
        scenario()
        dist.barrier()


def test_a_host_that_leaves(tmp_path: Path) -> None:
    run_ranks(all_of_them, 3, tmp_path)


@pytest.mark.parametrize(("scenario", "num_ranks"), [(a_rank_leaves, 3), (the_host_dies, 2)])
def test_ranks_that_die(scenario: Callable[[], None], num_ranks: int, tmp_path: Path) -> None:
    run_ranks(scenario, num_ranks, tmp_path)
