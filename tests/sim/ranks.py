"""Ranks of one process: N threads, each with its own ElasticBuffer, and one World in which their kernels meet.

Launches are queued, a stream a rank, and run when somebody needs what they write: then all ranks' streams run together.
So one rank can be in its second operation while another has not begun its first, as on GPUs. A gloo group's processes
meet in another way (deep_ep/machine/simulated.py), and share only the copying of memory into the world.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

import deep_ep
from deep_ep import jit, plan
from deep_ep.errors import EPError
from deep_ep.machine import simulated
from deep_ep.machine.relocation import Request, pack, redirect
from deep_ep.machine.simulated import SHARED_BYTES_PER_BLOCK, Guest, SimulatedWindow, homes_of, take_home
from deep_ep.machine.world import Launch, World

T = TypeVar("T")

KERNELS = Path(__file__).parent / "kernels"  # of the tests themselves
TIMEOUT_SECONDS = 200.0  # of a rank that waits for its peers' threads; what a seed may take at most


class Group(dist.ProcessGroup):
    """A process group as far as a buffer asks: who am I, and of how many."""

    machine: ThreadMachine  # of the buffer that was built over this group

    def __init__(self, rank: int, num_ranks: int) -> None:
        super().__init__(rank, num_ranks)  # type: ignore[call-arg]  # stubs lack this overload
        distributed_c10d._world.pg_group_ranks[self] = {peer: peer for peer in range(num_ranks)}
        distributed_c10d._world.pg_backend_config[self] = "cpu:gloo"


class AbandonedError(EPError):
    """Another rank has failed, and its error says why."""


class Meeting:
    """Where the ranks' threads meet: the last one to come serves all."""

    def __init__(self, num_ranks: int) -> None:
        self._barrier = threading.Barrier(num_ranks, action=self._serve_all, timeout=TIMEOUT_SECONDS)
        self._payloads: list[Any] = [None] * num_ranks
        self._serve: Callable[[list[Any]], Sequence[Any]] = list
        self._answers: Sequence[Any] = ()

    def ask(self, rank: int, payload: Any, serve: Callable[[list[Any]], Sequence[Any]]) -> Any:
        """Collective: serve takes all ranks' payloads and returns all ranks' answers, by rank."""
        self._payloads[rank], self._serve = payload, serve
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise AbandonedError("another rank failed first") from None
        return self._answers[rank]

    def _serve_all(self) -> None:
        self._answers = self._serve(self._payloads)

    def abandon(self) -> None:
        self._barrier.abort()


@dataclass(frozen=True)
class Settings:
    """How the ranks of one seed run: what the schedule of a real machine would decide.

    Attributes:
        toolchain: of the kernels; with the race detector exactly if the world has it.
        seed: of the first launch; later ones count on.
        num_sms: blocks that each rank's launches have at most; they may differ.
        delays: virtual nanoseconds by which each kernel of a rank starts late.
        patience: what becomes of waits when nothing can move any more (World.launch).
    """

    toolchain: jit.Gxx
    seed: int
    num_sms: tuple[int, ...]
    delays: Mapping[int, int]
    patience: Literal["report", "expire"] = "report"


@dataclass(frozen=True)
class Queued:
    """A launch that waits for its turn. It keeps its tensors alive."""

    kernel: jit.Kernel
    args: ctypes.Structure
    num_blocks: int
    shared_bytes: int
    reads: Sequence[torch.Tensor | None]
    writes: Sequence[torch.Tensor | None]


class Words:
    """Host words. To look at them is to wait for what reports into them."""

    def __init__(self, machine: ThreadMachine, count: int) -> None:
        self._machine = machine
        self.memory = torch.zeros(count, dtype=torch.int32)
        self.address = self.memory.data_ptr()

    @property
    def tensor(self) -> torch.Tensor:
        if any(getattr(queued.args, "host_words", None) == self.address for queued in self._machine.queue):
            self._machine.run()
        return self.memory

    def close(self) -> None:
        """Goes with the machine."""


class ThreadMachine:
    """deep_ep.machine.Machine for one of the threads."""

    name = "simulated"
    device = torch.device("cpu")
    shared_bytes_per_block = SHARED_BYTES_PER_BLOCK
    wire_gbs: float | None = None
    memory_gbs: float | None = None
    comm_stream = None
    launches_finish = False
    gone: Mapping[int, str] = {}

    def __init__(self, group: Group, ranks: Ranks) -> None:
        group.machine = self
        self.rank, self.num_ranks = group.rank(), group.size()
        self.num_sms = ranks.settings.num_sms[self.rank]
        self.queue: list[Queued] = []
        self._ranks = ranks
        self._words: list[Words] = []
        self._windows: list[SimulatedWindow] = []

    def allocate_window(self, num_bytes: int) -> SimulatedWindow:
        addresses = self._ranks.meeting.ask(self.rank, num_bytes, self._ranks.allocate_windows)
        self._windows.append(SimulatedWindow(addresses, num_bytes, None, self.rank))
        return self._windows[-1]

    def host_words(self, count: int) -> Words:
        self._words.append(Words(self, count))
        return self._words[-1]

    def prepare(self, kernels: Iterable[jit.Kernel]) -> None:
        """Kernels are built when they are launched: a seed seldom uses all."""

    def launch(
        self,
        kernel: jit.Kernel,
        args: ctypes.Structure,
        *,
        num_blocks: int,
        shared_bytes: int,
        stream: Any,
        reads: Sequence[torch.Tensor | None],
        writes: Sequence[torch.Tensor | None],
        meets_peers: bool = True,
    ) -> None:
        # The caller may change its own for the next launch, and shrink its tensors.
        own_args = type(args).from_buffer_copy(args)
        own_reads, own_writes = ([None if each is None else each.detach() for each in some] for some in (reads, writes))
        self.queue.append(Queued(kernel, own_args, num_blocks, shared_bytes, own_reads, own_writes))

    def run(self) -> None:
        """Run what is queued, on all ranks. Collective."""
        reads = [tensor for queued in self.queue for tensor in queued.reads]
        writes = [tensor for queued in self.queue for tensor in queued.writes] + [words.memory for words in self._words]
        homes = homes_of(self._windows)
        stream = [
            (queued, pack(queued.kernel.name, queued.args, reads, writes, self._is_window, homes))
            for queued in self.queue
        ]
        written = self._ranks.meeting.ask(self.rank, stream, self._ranks.run_streams)
        if stream:
            take_home(stream[0][1].regions, written)
        self.queue.clear()

    def _is_window(self, address: int) -> bool:
        return any(window.contains(address) for window in self._windows)

    def current_capture(self) -> int:
        return 0

    def meet(self, what: str, limit_s: float | None = None) -> None:
        self._ranks.meeting.ask(self.rank, None, lambda nothing: nothing)

    def all_gather_object(self, value: T, what: str, limit_s: float | None = None) -> list[T]:
        result: list[T] = self._ranks.meeting.ask(self.rank, value, lambda values: [list(values)] * self.num_ranks)
        return result

    def close(self, *, together: bool = False) -> None:
        """The world forgets all memory at once."""


@dataclass
class Ranks:
    """The ranks of one seed, and their world."""

    world: World
    num_ranks: int
    settings: Settings
    num_launches: int = 0
    num_steps: int = 0
    meeting: Meeting = field(init=False)
    artifacts: dict[jit.Kernel, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.meeting = Meeting(self.num_ranks)

    def allocate_windows(self, sizes: list[int]) -> list[tuple[int, ...]]:
        addresses = tuple(self.world.allocate(size, name=f"window of rank {rank}") for rank, size in enumerate(sizes))
        return [addresses] * self.num_ranks

    def run_streams(self, streams: list[list[tuple[Queued, Request]]]) -> list[list[bytes]]:
        """Run all ranks' queues together, each in its order; returns what each rank's memory holds afterwards."""
        guests = [Guest(self.world, rank, s[0][1].regions if s else ()) for rank, s in enumerate(streams)]
        launches = [
            Launch(
                kernel=self._artifact(queued.kernel),
                name=queued.kernel.entry,
                args=redirect(request, guest.addresses),
                rank=guest.rank,
                num_blocks=queued.num_blocks,
                num_threads=queued.kernel.num_threads,
                shared_bytes=queued.shared_bytes,
                in_order=idx > 0,
            )
            for guest, stream in zip(guests, streams, strict=True)
            for idx, (queued, request) in enumerate(stream)
        ]
        seed, self.num_launches = self.settings.seed + self.num_launches, self.num_launches + 1
        delays, patience = self.settings.delays, self.settings.patience
        self.num_steps += self.world.launch(launches, seed=seed, delays=delays, patience=patience).num_steps
        written = [guest.written() for guest in guests]
        for guest in guests:
            guest.leave()
        return written

    def _artifact(self, kernel: jit.Kernel) -> Path:
        if kernel not in self.artifacts:
            toolchain = replace(self.settings.toolchain, more_include_dirs=(KERNELS,))
            self.artifacts[kernel] = jit.build(kernel, toolchain).artifact
        return self.artifacts[kernel]

    def run(self, roles: plan.RolesOfMachine, program: Callable[[Group], None]) -> None:
        """Run a program on every rank; raises the error of the rank that failed first."""
        errors: list[BaseException] = []

        def enter(group: Group) -> None:
            try:
                program(group)
            except BaseException as error:  # it belongs to the thread that called run
                if not isinstance(error, AbandonedError):
                    errors.append(error)
                self.meeting.abandon()

        threads = [
            threading.Thread(target=enter, args=(Group(rank, self.num_ranks),), name=f"rank {rank}")
            for rank in range(self.num_ranks)
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(simulated, "SimulatedMachine", lambda group, environment, limits: ThreadMachine(group, self))
            patch.setitem(plan.ROLES, "simulated", roles)
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if errors:
            raise errors[0]


@dataclass(frozen=True)
class RewriteConfig:
    """There is nothing to choose."""


class RewriteArgs(ctypes.Structure):
    _fields_ = [("to", ctypes.c_void_p), ("values", ctypes.c_void_p), ("num_words", ctypes.c_int32)]


REWRITE = jit.Kernel("rewrite", RewriteConfig(), RewriteArgs, num_threads=32, header="rewrite.cuh")


class Buffer(deep_ep.ElasticBuffer):
    """A buffer whose calls can leave their launches in the queue.

    Attributes:
        overlaps: calls return before their kernels have run; run() runs them.
    """

    overlaps = False

    def dispatch(self, *args: Any, **kwargs: Any) -> Any:
        return self._finish(super().dispatch(*args, **kwargs))

    def combine(self, *args: Any, **kwargs: Any) -> Any:
        return self._finish(super().combine(*args, **kwargs))

    def write_in_order(self, to: torch.Tensor, values: torch.Tensor) -> None:
        """Queue other values for a tensor, behind the calls so far."""
        assert isinstance(self.group, Group)
        words, num_words = values.contiguous(), values.numel() * values.element_size() // 4
        if num_words:
            args = RewriteArgs(to.data_ptr(), words.data_ptr(), num_words)
            self.group.machine.launch(
                REWRITE, args, num_blocks=1, shared_bytes=0, stream=None, reads=[words], writes=[to]
            )

    def run(self) -> None:
        assert isinstance(self.group, Group)
        self.group.machine.run()

    def _finish(self, result: T) -> T:
        if not self.overlaps:
            self.run()
        return result
