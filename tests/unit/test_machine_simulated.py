"""The ranks of a gloo group meet in one world: real processes and a real group, a world made of Python dictionaries."""

from __future__ import annotations

import ctypes
import datetime
import gc
import os
import re
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from deep_ep import jit
from deep_ep.environment import Environment
from deep_ep.errors import EPError
from deep_ep.machine import backends_of, open_machine, simulated
from deep_ep.machine.meeting import Limits
from deep_ep.machine.simulated import SimulatedMachine
from deep_ep.machine.world import Launch, SimulationError

PATIENCE = datetime.timedelta(seconds=60)
LIMITS = Limits(host_s=30, kernel_s=30)


class ShiftArgs(ctypes.Structure):
    """y[i] = x[i] + what the left neighbour left in this rank's window; then x[0] goes to the right one's window."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("window", ctypes.c_void_p * 4),
        ("words", ctypes.c_void_p),
        ("count", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("num_ranks", ctypes.c_int32),
    )


class OtherArgs(ctypes.Structure):
    _fields_ = (("count", ctypes.c_int32),)


@dataclass(frozen=True)
class ShiftConfig:
    num_warps: int = 1


SHIFT = jit.Kernel("shift", ShiftConfig(), ShiftArgs, num_threads=32)
STUCK = jit.Kernel("stuck", ShiftConfig(), ShiftArgs, num_threads=32)


class FakeWorld:
    """Memory by address, and two kernels: shift and stuck."""

    def __init__(self) -> None:
        self.memory: dict[int, bytearray] = {}
        self.names: dict[int, str] = {}
        self.next = 0x1000_0000_0000
        self.seeds: list[int] = []
        self.patience: list[str] = []
        self.num_closed = 0

    def allocate(self, num_bytes: int, *, fill: int = 0, name: str = "") -> int:
        address, self.next = self.next, self.next + (num_bytes + 0xFFFF) // 0x1000 * 0x1000
        self.memory[address] = bytearray([fill]) * num_bytes
        self.names[address] = name
        return address

    def free(self, address: int) -> None:
        del self.memory[address]

    def close(self) -> None:
        self.num_closed += 1

    def _at(self, address: int, num_bytes: int) -> tuple[bytearray, slice]:
        for base, data in self.memory.items():
            if base <= address and address + num_bytes <= base + len(data):
                return data, slice(address - base, address - base + num_bytes)
        raise AssertionError(f"{address:#x} is not allocated")

    def write(self, address: int, data: bytes) -> None:
        memory, where = self._at(address, len(data))
        memory[where] = data

    def read(self, address: int, num_bytes: int) -> bytes:
        memory, where = self._at(address, num_bytes)
        return bytes(memory[where])

    def launch(self, launches: Sequence[Launch], *, seed: int, patience: str) -> None:
        self.seeds.append(seed)
        self.patience.append(patience)
        if launches[0].name == "deep_ep_stuck":
            raise SimulationError("deadlock: everybody waits", seed)
        outgoing = {}
        for launch in launches:
            args = ShiftArgs.from_buffer_copy(launch.args)
            values = struct.unpack(f"<{args.count}i", self.read(args.x, 4 * args.count))
            (incoming,) = struct.unpack("<i", self.read(args.window[args.rank], 4))
            self.write(args.y, struct.pack(f"<{args.count}i", *(value + incoming for value in values)))
            self.write(args.words, struct.pack("<i", 100 + args.rank))
            outgoing[args.window[(args.rank + 1) % args.num_ranks]] = values[0]
        for address, value in outgoing.items():
            self.write(address, struct.pack("<i", value))


def use_fakes() -> None:
    simulated.World = FakeWorld  # type: ignore[assignment, misc]
    simulated._build = lambda kernel, environment: SimpleNamespace(artifact=Path("kernel.so"))  # type: ignore[assignment]


class Rank:
    """A machine with one window, some host words and the two tensors of a shift."""

    def __init__(self, group: dist.ProcessGroup, limits: Limits = LIMITS) -> None:
        self.machine = SimulatedMachine(group, Environment(), limits)
        self.window = self.machine.allocate_window(64)
        self.words = self.machine.host_words(2)
        self.x = torch.arange(1, 5, dtype=torch.int32) * 10 + self.machine.rank
        self.y = torch.zeros(4, dtype=torch.int32)

    def args(self) -> ShiftArgs:
        args = ShiftArgs(
            x=self.x.data_ptr(),
            y=self.y.data_ptr(),
            words=self.words.address,
            count=4,
            rank=self.machine.rank,
            num_ranks=self.machine.num_ranks,
        )
        for rank, address in enumerate(self.window.addresses):
            args.window[rank] = address
        return args

    def launch(
        self,
        kernel: jit.Kernel = SHIFT,
        args: ctypes.Structure | None = None,
        *,
        num_blocks: int = 2,
        alone: bool = False,
    ) -> None:
        self.machine.launch(
            kernel,
            args or self.args(),
            num_blocks=num_blocks,
            shared_bytes=0,
            stream=None,
            reads=[self.x],
            writes=[self.y],
            meets_peers=not alone,
        )


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rank]:
    monkeypatch.setattr(simulated, "World", simulated.World)  # so that both are put back
    monkeypatch.setattr(simulated, "_build", simulated._build)
    use_fakes()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    yield Rank(dist.group.WORLD)
    dist.destroy_process_group()


def ended(world: FakeWorld) -> None:
    """The host's thread ends it, a moment after the last rank has hung up."""
    deadline = time.monotonic() + 20
    while not world.num_closed:
        assert time.monotonic() < deadline, "nobody has ended the world"
        time.sleep(0.01)


def world_of(rank: Rank) -> FakeWorld:
    assert rank.machine._service is not None
    world = rank.machine._service.world
    assert isinstance(world, FakeWorld)
    return world


def test_one_rank_alone_launches_on_its_own_memory(alone: Rank) -> None:
    alone.launch()
    assert alone.y.tolist() == [10, 20, 30, 40]
    alone.launch()
    assert alone.y.tolist() == [20, 30, 40, 50]  # its window is its own left neighbour's
    assert alone.words.tensor.tolist() == [100, 0]
    assert alone.x.tolist() == [10, 20, 30, 40]


def test_every_launch_has_a_seed_of_its_own(alone: Rank) -> None:
    for _ in range(3):
        alone.launch()
    assert world_of(alone).seeds == [0, 1, 2]


def test_a_launch_leaves_nothing_in_the_world_but_windows(alone: Rank) -> None:
    alone.launch()
    world = world_of(alone)
    assert [world.names[address] for address in world.memory] == ["window of rank 0"]
    assert "y of rank 0" in world.names.values()
    alone.window.close()
    alone.window.close()
    assert not world.memory


def test_strided_rows_are_written_where_they_are(alone: Rank) -> None:
    storage = torch.full((2, 8), -1, dtype=torch.int32)
    alone.y = storage[1, 2:6]
    alone.launch()
    assert storage.tolist() == [[-1] * 8, [-1, -1, 10, 20, 30, 40, -1, -1]]


def test_a_failed_simulation_ends_the_machine(alone: Rank) -> None:
    world = world_of(alone)
    with pytest.raises(SimulationError, match="failed with seed 0: deadlock"):
        alone.launch(STUCK)
    assert world.num_closed == 1
    with pytest.raises(EPError, match=r"cannot be used any more: an earlier launch failed.*build a new buffer"):
        alone.launch()


def test_closing_twice_closes_once(alone: Rank) -> None:
    world = world_of(alone)
    alone.machine.close(together=True)
    alone.machine.close()
    alone.window.close()
    assert world.num_closed == 1
    with pytest.raises(EPError, match="it was closed"):
        alone.launch()


def test_nothing_is_asked_for_on_the_way_out(alone: Rank) -> None:
    """What the host answers would be to the question before."""
    alone.machine._line.ask = asked = mock.Mock(side_effect=KeyboardInterrupt)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        alone.launch()
    alone.window.close()
    alone.machine.close()
    asked.assert_called_once()


def test_a_forgotten_machine_closes_its_world(alone: Rank) -> None:
    world = world_of(alone)
    del alone.machine
    gc.collect()
    ended(world)


def test_wrong_arguments_leave_the_machine_usable(alone: Rank) -> None:
    with pytest.raises(TypeError, match="shift takes a ShiftArgs"):
        alone.launch(args=OtherArgs(1))
    with pytest.raises(ValueError, match=r"^x of shift points to 0x10, which is in no tensor"):
        alone.launch(args=ShiftArgs(x=16))
    alone.launch()


def test_open_machine_simulates_a_gloo_group(alone: Rank) -> None:
    machine = open_machine(dist.group.WORLD, Environment(), LIMITS)
    assert (machine.name, machine.rank, machine.num_ranks) == ("simulated", 0, 1)
    machine.meet("to see")
    assert machine.all_gather_object("here", "to say") == ["here"]
    machine.close()


def test_only_a_group_of_nccl_or_gloo_will_do(alone: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.distributed\.ProcessGroup, but it is a str"):
        open_machine("world", Environment(), LIMITS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not contain this rank"):
        backends_of(dist.GroupMember.NON_GROUP_MEMBER)
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cpu:mpi,cuda:mpi")
    with pytest.raises(ValueError, match=r"backends \{'cpu': 'mpi', 'cuda': 'mpi'\}.*nccl with GPUs, or gloo"):
        open_machine(dist.group.WORLD, Environment(), LIMITS)


def run_ranks(scenario: Callable[..., None], num_ranks: int, folder: Path) -> None:
    multiprocessing.spawn(enter_rank, (num_ranks, folder, scenario), nprocs=num_ranks)


def enter_rank(rank: int, num_ranks: int, folder: Path, scenario: Callable[..., None]) -> None:
    torch.set_num_threads(1)
    use_fakes()
    store = dist.FileStore(str(folder / "store"), num_ranks)
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks, store=store, timeout=PATIENCE)
    scenario()
    dist.destroy_process_group()


def error_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def three_ranks_in_a_subgroup_of_four() -> None:
    group = dist.new_group([1, 2, 3], timeout=PATIENCE)  # its rank 0 is rank 1 of the world
    if dist.get_rank() == 0:
        return
    rank = Rank(group)
    machine = rank.machine
    left = (machine.rank - 1) % 3
    rank.launch()
    rank.launch()
    assert rank.y.tolist() == [value + 10 + left for value in rank.x.tolist()]
    assert rank.words.tensor.tolist() == [100 + machine.rank, 0]

    # What one rank does wrong, all are told, and can go on.
    wrong_args = ShiftArgs(y=8) if machine.rank == 2 else None
    text = error_of(lambda: rank.launch(args=wrong_args))
    who = "" if machine.rank == 2 else "rank 2 of the group: "
    assert text.startswith(f"ValueError: {who}y of shift points to 0x8"), text
    rank.launch(num_blocks=3 if machine.rank == 1 else 2)
    text = error_of((lambda: rank.machine.allocate_window(8)) if machine.rank == 2 else rank.launch)
    assert text == "EPError: ranks are in different steps: rank 0: a launch; rank 2: allocate_window", text
    text = error_of(lambda: rank.machine.allocate_window(8 + machine.rank))
    assert text.startswith("ValueError: num_bytes must be the same on all ranks, but by rank it is [8, 9, 10]"), text
    if machine.rank == 1:
        rank.launch(alone=True)  # waits for nobody
    rank.launch()

    text = error_of(lambda: rank.launch(STUCK))
    assert text == "SimulationError: simulated launch failed with seed 5: deadlock: everybody waits", text
    machine.meet("to end")
    machine.close()
    dist.barrier(group)


def a_rank_comes_late() -> None:
    limits = Limits(host_s=60, kernel_s=0.5)
    rank = Rank(dist.group.WORLD, limits)
    rank.launch()
    if rank.machine.rank == 1:
        time.sleep(4)
        text = error_of(rank.launch)
        assert text.startswith(
            "EPError: these simulated ranks cannot go on: a launch of shift has gone on without rank 1 (did not come); "
            "rank 1 is this one, and came too late; build a new buffer"
        ), text
    else:
        start = time.monotonic()
        rank.launch()
        assert 0.4 < time.monotonic() - start < 3.5
    # All are alive: they can build anew.
    rank.machine.meet("to end")
    rank.machine.close()
    again = Rank(dist.group.WORLD, limits)
    again.launch()
    again.machine.meet("to end")
    again.machine.close()


def a_rank_never_comes() -> None:
    """To build a machine: the others are told which, and can build one later, when it comes."""
    group, limits = dist.group.WORLD, Limits(host_s=0.5)
    if dist.get_rank() == 1:
        time.sleep(4)
    else:
        start = time.monotonic()
        text = error_of(lambda: Rank(group, limits))
        assert re.match(
            r"EPTimeoutError: rank \d waited \d\.\d s for ranks \[1\] of the group to build a buffer", text
        ), text
        assert time.monotonic() - start < 3.5
    rank = Rank(group)
    rank.launch()
    rank.machine.meet("to end")
    rank.machine.close()


def steps_that_differ() -> None:
    machine = SimulatedMachine(dist.group.WORLD, Environment(), LIMITS)
    text = error_of(lambda: machine.meet("to sing" if machine.rank == 0 else "to dance"))
    other, mine, theirs = (1, "to sing", "to dance") if machine.rank == 0 else (0, "to dance", "to sing")
    assert text == f"EPError: ranks are in different steps: rank {machine.rank} came {mine}, rank {other} {theirs}", (
        text
    )
    machine.meet("to end")
    machine.close()


def test_ranks_of_a_subgroup_meet_and_share_their_errors(tmp_path: Path) -> None:
    run_ranks(three_ranks_in_a_subgroup_of_four, 4, tmp_path)


def what_all_survive() -> None:
    """One after the other in the same processes, which take seconds to start."""
    for scenario in (
        a_rank_comes_late,
        a_rank_never_comes,
        steps_that_differ,
        a_rank_is_interrupted,
    ):
        scenario()
        dist.barrier()


def test_ranks_that_are_missed(tmp_path: Path) -> None:
    run_ranks(what_all_survive, 3, tmp_path)


def a_rank_is_interrupted() -> None:
    """Ctrl-C gets through while a rank waits for peers that do not come."""
    rank = Rank(dist.group.WORLD)
    if rank.machine.rank == 0:
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            rank.launch()
        assert "it was left in a launch of shift (KeyboardInterrupt)" in error_of(rank.launch)
    rank.machine.meet("to end")
    rank.machine.close()
