"""Simulated ranks: all memory and all kernels of a gloo group live in one child process of rank 0.

A launch is synchronous. Every rank brings rank 0 its arguments and the bytes of its tensors (host.py); a thread there
lays them out in the world (world.py), runs all ranks' kernels together, and sends back what they wrote. The kernels of
ranks whose peers do not come run without them: they wait in virtual time, give up, and leave the record that they would
leave on a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import socket
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from deep_ep import jit
from deep_ep.environment import Environment
from deep_ep.errors import EPEnvironmentError, EPError, EPTimeoutError, EPTopologyError
from deep_ep.machine import raise_together
from deep_ep.machine.host import END_SECONDS, LATE, Ask, Host, Line
from deep_ep.machine.meeting import Limits, Meeting
from deep_ep.machine.relocation import Home, Region, Request, pack, redirect
from deep_ep.machine.world import Launch, SimulationError, World

T = TypeVar("T")

NUM_SMS = 4  # small: every block is some hundred fibers
SHARED_BYTES_PER_BLOCK = 232448  # as on sm_90, so that both machines' plans are alike
ALIGNMENT = 16  # bytes; what bulk copies check, so a tensor keeps its address modulo this
LAUNCH, ALLOCATE, PREPARE, FREE = "a launch", "allocate_window", "prepare", "free"  # steps


@dataclass(frozen=True)
class Failure:
    """An error on its way to other ranks."""

    kind: str
    text: str
    seed: int = 0

    @classmethod
    def of(cls, error: Exception) -> Failure:
        if isinstance(error, SimulationError):
            return cls(SimulationError.__name__, error.report, error.seed)
        return cls(type(error).__name__, str(error))

    def error(self) -> Exception:
        """The same error again; of a kind that has more to it than a text, a plain EPError."""
        if self.kind == SimulationError.__name__:
            return SimulationError(self.text, self.seed)
        kinds = (EPEnvironmentError, EPTimeoutError, ValueError, TypeError)
        return {kind.__name__: kind for kind in kinds}.get(self.kind, EPError)(self.text)


class SimulatedWindow:
    """One rank's handle on the windows of all ranks, which live in the world."""

    def __init__(self, addresses: tuple[int, ...], num_bytes: int, line: Line | None, rank: int) -> None:
        self.addresses = addresses
        self.num_bytes = num_bytes
        self.homes: list[Home] = []
        self._own = addresses[rank]
        self._line = line  # of rank 0 only, which frees all ranks' windows
        self.closed = False

    def contains(self, address: int) -> bool:
        return any(base <= address < base + self.num_bytes for base in self.addresses)

    def part(self, offset: int, num_bytes: int) -> torch.Tensor:
        memory = torch.zeros(num_bytes, dtype=torch.uint8)
        self.homes.append(Home(memory, self._own + offset))
        return memory

    def close(self) -> None:
        if self._line is not None and not self.closed:
            self._line.ask(Ask(FREE, self.addresses, limit_s=0, alone=True))
        self.closed = True


class SimulatedWords:
    """Host words travel with every launch like a tensor, so their address in the rank's own process will do."""

    def __init__(self, count: int) -> None:
        self.tensor = torch.zeros(count, dtype=torch.int32)
        self.address = self.tensor.data_ptr()
        self.closed = False

    def close(self) -> None:
        self.closed = True


@dataclass(frozen=True)
class Part:
    """One rank's part of a launch; kernels may differ, and find that out themselves."""

    kernel: jit.Kernel
    num_blocks: int
    shared_bytes: int
    request: Request


@dataclass(frozen=True)
class Done:
    """What a rank hears of a launch: what its writable regions hold now, and which peers cannot come, and why."""

    written: list[bytes]
    gone: Mapping[int, str]


class Service:
    """What rank 0 does for all ranks: it has the world."""

    def __init__(self, num_ranks: int, environment: Environment) -> None:
        self.world = World()
        self._num_ranks = num_ranks
        self._environment = environment
        self._num_launches = 0
        self._failed_because = ""
        self._absent: Mapping[int, str] = {}  # in the step without which it failed

    def __call__(self, asks: Mapping[int, Ask], missing: Mapping[int, str]) -> Mapping[int, Any]:
        """Serve a step of those who came to it; whatever goes wrong, all of them are told."""
        try:
            if self._failed_because:
                return {rank: Failure.of(self._refusal(rank)) for rank in asks}
            require_same({rank: ask.what for rank, ask in asks.items()}, "are in different steps")
            return self._serve(asks, missing)
        except Exception as error:
            return dict.fromkeys(asks, Failure.of(error))

    def _serve(self, asks: Mapping[int, Ask], missing: Mapping[int, str]) -> Mapping[int, Any]:
        first = asks[min(asks)]
        payloads = {rank: ask.payload for rank, ask in asks.items()}
        if missing:
            absent = ", ".join(f"rank {rank} ({why})" for rank, why in missing.items())
            self._absent = missing
            self._failed_because = f"{first.text} has gone on without {absent}"
            if first.what != LAUNCH:
                raise EPTimeoutError(f"{self._failed_because}; the others waited {first.limit_s} s at most")
        if first.what == LAUNCH:
            gone = {rank: why for rank, why in missing.items() if why != LATE}
            written = self._launch(payloads, expire=bool(missing))
            return {rank: Done(data, gone) for rank, data in written.items()}
        if first.what == ALLOCATE:
            return self._allocate(payloads)
        if first.what == FREE:
            for address in first.payload:
                self.world.free(address)
        if first.what == PREPARE:
            for kernel in first.payload:
                _build(kernel, self._environment)
        return dict.fromkeys(asks)

    def _refusal(self, rank: int) -> EPError:
        """What a rank hears of every later step."""
        you = f"; rank {rank} is this one, and came too late" if rank in self._absent else ""
        return EPError(f"these simulated ranks cannot go on: {self._failed_because}{you}; build a new buffer")

    def _allocate(self, sizes: Mapping[int, int]) -> Mapping[int, tuple[int, ...]]:
        if len(set(sizes.values())) > 1:
            raise ValueError(f"num_bytes must be the same on all ranks, but by rank it is {list(sizes.values())}")
        addresses = tuple(self.world.allocate(size, name=f"window of rank {rank}") for rank, size in sizes.items())
        return dict.fromkeys(sizes, addresses)

    def _launch(self, parts: Mapping[int, Part | Failure], expire: bool) -> Mapping[int, list[bytes]]:
        """Run one launch of these ranks in the world; returns what each writable region of each holds afterwards."""
        good = agree(parts)
        artifacts = {rank: _build(part.kernel, self._environment).artifact for rank, part in good.items()}
        guests = {rank: Guest(self.world, rank, part.request.regions) for rank, part in good.items()}
        launches = [
            Launch(
                kernel=artifacts[rank],
                name=part.kernel.entry,
                args=redirect(part.request, guests[rank].addresses),
                rank=rank,
                num_blocks=part.num_blocks,
                num_threads=part.kernel.num_threads,
                shared_bytes=part.shared_bytes,
            )
            for rank, part in good.items()
        ]
        seed, self._num_launches = self._num_launches, self._num_launches + 1
        try:
            self.world.launch(launches, seed=seed, patience="expire" if expire else "report")
        except SimulationError:
            self._failed_because = "an earlier launch failed, so its counters and flags are in no known state"
            self.world.close()
            raise
        written = {rank: guest.written() for rank, guest in guests.items()}
        for guest in guests.values():
            guest.leave()
        return written


class SimulatedMachine:
    """See deep_ep.machine.Machine; launches are collective and synchronous."""

    name = "simulated"
    device = torch.device("cpu")
    num_sms = NUM_SMS
    wire_gbs: float | None = None
    memory_gbs: float | None = None
    shared_bytes_per_block = SHARED_BYTES_PER_BLOCK
    comm_stream = None
    launches_finish = True

    def __init__(self, group: dist.ProcessGroup, environment: Environment, limits: Limits) -> None:
        self.rank, self.num_ranks = group.rank(), group.size()
        self.gone: Mapping[int, str] = {}
        self._limits = limits
        self._windows: list[SimulatedWindow] = []
        self._words: list[SimulatedWords] = []
        self._closed_because = ""
        self._meeting = Meeting(group, limits)
        self._service: Service | None = None  # on rank 0 only
        self._host: Host | None = None
        self._leave_host: Callable[[], Any] = lambda: None
        self._line = self._connect(environment)

    def _connect(self, environment: Environment) -> Line:
        hosts = self.all_gather_object(socket.gethostname(), "to compare their machines")
        if len(set(hosts)) > 1:
            raise EPTopologyError(f"simulated ranks must be processes of one machine, but by rank they are on {hosts}")
        problem, address = None, ""
        try:
            if self.rank == 0:
                self._service = Service(self.num_ranks, environment)
                self._host = Host(self.num_ranks, self._service, self._limits.host_s, self._service.world.close)
                address = self._host.address
                # Whoever forgets to close the machine must not leave a process behind.
                longest_s = max(self._limits.host_s, self._limits.kernel_s)
                self._leave_host = weakref.finalize(self, self._host.leave, longest_s)
        except Exception as error:
            problem = error
        raise_together(problem, self.all_gather_object)
        return Line(self.all_gather_object(address, "to connect with rank 0")[0], self.rank)

    def allocate_window(self, num_bytes: int) -> SimulatedWindow:
        addresses = self._ask(Ask(ALLOCATE, num_bytes, self._limits.host_s))
        window = SimulatedWindow(addresses, num_bytes, self._line if self.rank == 0 else None, self.rank)
        self._windows.append(window)
        return window

    def host_words(self, count: int) -> SimulatedWords:
        words = SimulatedWords(count)
        self._words.append(words)
        return words

    def prepare(self, kernels: Iterable[jit.Kernel]) -> None:
        self._ask(Ask(PREPARE, list(kernels), self._limits.host_s))

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
        self._require_open()
        # A rank whose arguments are wrong still takes part: its peers wait for it, and are told.
        part: Part | Failure
        mistake = None
        try:
            if not isinstance(args, kernel.args):
                raise TypeError(f"{kernel.name} takes a {kernel.args.__name__}, but args is a {type(args).__name__}")
            self._words = [words for words in self._words if not words.closed]
            writes = [*writes, *(words.tensor for words in self._words)]
            request = pack(kernel.name, args, reads, writes, self._is_window, homes_of(self._windows))
            part = Part(kernel, num_blocks, shared_bytes, request)
        except (TypeError, ValueError) as error:
            mistake = error
            part = Failure.of(error)
        try:
            limit_s = self._limits.kernel_s
            done = self._ask(Ask(LAUNCH, part, limit_s, alone=not meets_peers, detail=kernel.name))
        except SimulationError:
            self._end_because("an earlier launch failed, so its counters and flags are in no known state")
            raise
        except Exception:
            if mistake is not None:
                raise mistake from None
            raise
        if isinstance(part, Part):  # always: a failure has raised on every rank
            self.gone = {**self.gone, **done.gone}
            take_home(part.request.regions, done.written)

    def _is_window(self, address: int) -> bool:
        return any(window.contains(address) for window in self._windows if not window.closed)

    def current_capture(self) -> int:
        return 0

    def meet(self, what: str, limit_s: float | None = None) -> None:
        self._meeting.all_gather(None, what, limit_s)

    def all_gather_object(self, value: T, what: str, limit_s: float | None = None) -> list[T]:
        return self._meeting.all_gather(value, what, limit_s)

    def close(self, *, together: bool = False) -> None:
        self._end_because(self._closed_because or "it was closed")
        self._line.close()
        self._leave_host()
        if together and self._host is not None:
            self._host.join(END_SECONDS)

    def _end_because(self, reason: str) -> None:
        """No further step is possible. The host is asked for nothing on the way out: it may be in the midst of another
        step, or this its own thread, which has come to collect garbage. Windows go with the world."""
        self._closed_because = reason
        for window in self._windows:
            window.closed = True

    def _require_open(self) -> None:
        if self._closed_because:
            raise EPError(f"this machine cannot be used any more: {self._closed_because}; build a new buffer")

    def _ask(self, ask: Ask) -> Any:
        """Bring something to a step, and return what the host has for this rank; raises what went wrong there."""
        self._require_open()
        try:
            answer = self._line.ask(ask)
        except BaseException as error:  # the host has gone, or Ctrl-C: no later answer would be to a later question
            self._end_because(f"it was left in {ask.text} ({type(error).__name__})")
            raise
        if isinstance(answer, Failure):
            raise answer.error()
        return answer


def homes_of(windows: Iterable[SimulatedWindow]) -> list[Home]:
    """What a rank's process holds of its windows."""
    return [home for window in windows if not window.closed for home in window.homes]


@functools.cache
def _build(kernel: jit.Kernel, environment: Environment) -> jit.Built:
    return jit.build(kernel, jit.Gxx(environment=environment))


def require_same(texts: Mapping[int, str], complaint: str) -> None:
    """Raise EPError, naming two ranks, unless all ranks say the same."""
    first = min(texts)
    for rank, text in texts.items():
        if text != texts[first]:
            raise EPError(f"ranks {complaint}: rank {first}: {texts[first]}; rank {rank}: {text}")


def agree(parts: Mapping[int, Part | Failure]) -> dict[int, Part]:
    """All ranks' parts, or the first failure as an exception."""
    good = {}
    for rank, part in sorted(parts.items()):
        if isinstance(part, Failure):
            raise Failure(part.kind, f"rank {rank} of the group: {part.text}").error()
        good[rank] = part
    return good


class Guest:
    """What one rank's kernels work on, copied into the world for as long as they run.

    Attributes:
        addresses: of the regions, in the world.
    """

    def __init__(self, world: World, rank: int, regions: Sequence[Region]) -> None:
        self.rank = rank
        self._world = world
        self._regions = regions
        self._borrowed: list[int] = []
        self.addresses = [self._place(region) for region in regions]

    def _place(self, region: Region) -> int:
        if region.home is not None:
            if region.data:
                self._world.write(region.home, region.data)
            return region.home
        skew = region.start % ALIGNMENT
        num_bytes = max(1, skew + len(region.data))
        self._borrowed.append(self._world.allocate(num_bytes, name=f"{region.name} of rank {self.rank}"))
        if region.data:
            self._world.write(self._borrowed[-1] + skew, region.data)
        return self._borrowed[-1] + skew

    def written(self) -> list[bytes]:
        """What each writable region holds now."""
        return [
            self._world.read(address, len(region.data))
            for region, address in zip(self._regions, self.addresses, strict=True)
            if region.writable
        ]

    def leave(self) -> None:
        """Give the memory back."""
        for address in self._borrowed:
            self._world.free(address)
        self._borrowed.clear()


def take_home(regions: Sequence[Region], written: Sequence[bytes]) -> None:
    """Put what a Guest's writable regions held into the memory that they were copied from."""
    for region, data in zip((region for region in regions if region.writable), written, strict=True):
        ctypes.memmove(region.start, data, len(data))
