"""Simulated ranks: all memory and all kernels of a gloo group live in one child process of rank 0.

A launch is collective and synchronous. Every rank sends rank 0 its arguments and the bytes of its tensors; rank 0 lays
them out in the world (world.py), runs all ranks' kernels together there, and sends back what they wrote.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from deep_ep import jit
from deep_ep.environment import Environment
from deep_ep.errors import EPEnvironmentError, EPError
from deep_ep.machine.relocation import Region, Request, pack, redirect
from deep_ep.machine.world import Launch, SimulationError, World

T = TypeVar("T")

NUM_SMS = 4  # small: every block is some hundred fibers
SHARED_BYTES_PER_BLOCK = 232448  # as on sm_90, so that both machines' plans are alike
ALIGNMENT = 16  # bytes; what bulk copies check, so a tensor keeps its address modulo this


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
        kinds = (EPEnvironmentError, ValueError, TypeError)
        return {kind.__name__: kind for kind in kinds}.get(self.kind, EPError)(self.text)


class SimulatedWindow:
    """One rank's handle on the windows of all ranks, which live in the world."""

    def __init__(self, addresses: tuple[int, ...], num_bytes: int, world: World | None) -> None:
        self.addresses = addresses
        self.num_bytes = num_bytes
        self._world = world  # on rank 0 only, which frees all ranks' windows
        self.closed = False

    def contains(self, address: int) -> bool:
        return any(base <= address < base + self.num_bytes for base in self.addresses)

    def close(self) -> None:
        if self._world is not None and not self.closed:
            for address in self.addresses:
                self._world.free(address)
        self.closed = True


class SimulatedWords:
    """Host words travel with every launch like a tensor, so their address in the rank's own process will do."""

    def __init__(self, count: int) -> None:
        self.tensor = torch.zeros(count, dtype=torch.int32)
        self.address = self.tensor.data_ptr()
        self.closed = False

    def close(self) -> None:
        self.closed = True


class SimulatedMachine:
    """See deep_ep.machine.Machine; launches are collective and synchronous."""

    name = "simulated"
    device = torch.device("cpu")
    num_sms = NUM_SMS
    wire_gbs: float | None = None
    shared_bytes_per_block = SHARED_BYTES_PER_BLOCK
    comm_stream = None

    def __init__(self, group: dist.ProcessGroup, environment: Environment) -> None:
        self._group = group
        self._environment = environment
        self.rank, self.num_ranks = group.rank(), group.size()
        self._host = dist.get_global_rank(group, 0)
        self._world: World | None = None  # on rank 0 only
        self._close_world: Callable[[], Any] = lambda: None
        self._windows: list[SimulatedWindow] = []
        self._words: list[SimulatedWords] = []
        self._num_launches = 0
        self._closed_because = ""
        self._ask_host("open_machine", None, self._start_world)

    def _start_world(self, _: list[None]) -> list[None]:
        self._world = World()
        # Whoever forgets to close the machine must not leave a process behind.
        self._close_world = weakref.finalize(self, self._world.close)
        return [None] * self.num_ranks

    def allocate_window(self, num_bytes: int) -> SimulatedWindow:
        addresses = self._ask_host("allocate_window", num_bytes, self._allocate_windows)
        window = SimulatedWindow(addresses, num_bytes, self._world)
        self._windows.append(window)
        return window

    def _allocate_windows(self, sizes: list[int]) -> list[tuple[int, ...]]:
        if len(set(sizes)) > 1:
            raise ValueError(f"num_bytes must be the same on all ranks, but by rank it is {sizes}")
        world = self._require_world()
        addresses = tuple(world.allocate(size, name=f"window of rank {rank}") for rank, size in enumerate(sizes))
        return [addresses] * self.num_ranks

    def host_words(self, count: int) -> SimulatedWords:
        words = SimulatedWords(count)
        self._words.append(words)
        return words

    def prepare(self, kernels: Iterable[jit.Kernel]) -> None:
        kernels = list(kernels)
        self._ask_host(f"prepare({', '.join(map(describe, kernels))})", None, lambda _: self._build_all(kernels))

    def _build_all(self, kernels: list[jit.Kernel]) -> list[None]:
        for kernel in kernels:
            self._build(kernel)
        return [None] * self.num_ranks

    def _build(self, kernel: jit.Kernel) -> jit.Built:
        return _build(kernel, self._environment)

    def launch(
        self,
        kernel: jit.Kernel,
        args: ctypes.Structure,
        *,
        num_blocks: int,
        shared_bytes: int,
        stream: Any,
        reads: Sequence[torch.Tensor],
        writes: Sequence[torch.Tensor],
        cooperative: bool = False,
    ) -> None:
        self._require_open()
        # A rank whose arguments are wrong still takes part: its peers wait for it, and are told.
        request: Request | Failure
        mistake = None
        try:
            what = f"{describe(kernel)}, {num_blocks} blocks, {shared_bytes} bytes of shared memory"
            if not isinstance(args, kernel.args):
                raise TypeError(f"{kernel.name} takes a {kernel.args.__name__}, but args is a {type(args).__name__}")
            self._words = [words for words in self._words if not words.closed]
            writes = [*writes, *(words.tensor for words in self._words)]
            request = pack(what, kernel.name, args, reads, writes, self._is_window)
        except (TypeError, ValueError) as error:
            mistake = error
            request = Failure.of(error)

        def serve(requests: list[Request | Failure]) -> list[list[bytes]]:
            return self._run(kernel, agree(requests), num_blocks, shared_bytes)

        try:
            written = self._ask_host("launch", request, serve)
        except SimulationError:
            self._closed_because = "an earlier launch failed, so its counters and flags are in no known state"
            self.close()
            raise
        except Exception:
            if mistake is not None:
                raise mistake from None
            raise
        if isinstance(request, Request):  # always: a failure has raised on every rank
            take_home(request.regions, written)

    def _is_window(self, address: int) -> bool:
        return any(window.contains(address) for window in self._windows if not window.closed)

    def _run(
        self, kernel: jit.Kernel, requests: list[Request], num_blocks: int, shared_bytes: int
    ) -> list[list[bytes]]:
        """Run one launch of all ranks in the world; returns what each writable region of each rank holds afterwards."""
        world = self._require_world()
        artifact = self._build(kernel).artifact
        guests = [Guest(world, rank, request.regions) for rank, request in enumerate(requests)]
        launches = [
            Launch(
                kernel=artifact,
                name=kernel.entry,
                args=redirect(request, guest.addresses),
                rank=guest.rank,
                num_blocks=num_blocks,
                num_threads=kernel.num_threads,
                shared_bytes=shared_bytes,
            )
            for request, guest in zip(requests, guests, strict=True)
        ]
        seed, self._num_launches = self._num_launches, self._num_launches + 1
        world.launch(launches, seed=seed)
        written = [guest.written() for guest in guests]
        for guest in guests:
            guest.leave()
        return written

    def current_capture(self) -> int:
        return 0

    def barrier(self, stream: Any = None) -> None:
        self.meet()

    def meet(self) -> None:
        with self._together("barrier"):
            dist.barrier(self._group)

    def all_gather_object(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.num_ranks
        with self._together("all_gather_object"):
            dist.all_gather_object(values, value, group=self._group)
        return values

    def close(self) -> None:
        self._closed_because = self._closed_because or "it was closed"
        for window in self._windows:
            window.closed = True  # freed with the world
        self._close_world()
        self._world = None

    @contextlib.contextmanager
    def _together(self, what: str) -> Iterator[None]:
        """Around a step of torch.distributed, whose own error would speak of sockets."""
        try:
            yield
        except RuntimeError as error:
            self._closed_because = "a rank left the group"
            raise EPError(f"a rank left the group while this one was in {what}: {error}") from error

    def _require_open(self) -> None:
        if self._closed_because:
            raise EPError(f"this machine cannot be used any more: {self._closed_because}; build a new buffer")

    def _require_world(self) -> World:
        if self._world is None:
            raise EPError("the simulated machine of rank 0 is closed")
        return self._world

    def _ask_host(self, what: str, payload: Any, serve: Callable[[list[Any]], Sequence[Any]]) -> Any:
        """Send a payload to rank 0, which serves all ranks together, and return what it has for this one. Collective.

        Args:
            what: names the step; ranks that are in different steps are told so.
            payload: anything that can be pickled.
            serve: runs on rank 0; takes all ranks' payloads, returns all ranks' results, by rank.

        Raises:
            whatever serve raises, on all ranks.
        """
        self._require_open()
        questions: list[Any] = [None] * self.num_ranks
        answers: list[Any] = [None] * self.num_ranks
        answer: list[Any] = [None]
        own_error = None
        is_host = self.rank == 0
        with self._together(what):
            dist.gather_object((what, payload), questions if is_host else None, dst=self._host, group=self._group)
        if is_host:
            try:
                require_same([question[0] for question in questions], "are in different steps")
                answers = list(serve([question[1] for question in questions]))
            except Exception as error:  # whatever it is, the peers must not wait for an answer
                own_error = error
                answers = [Failure.of(error)] * self.num_ranks
        with self._together(what):
            dist.scatter_object_list(answer, answers if is_host else None, src=self._host, group=self._group)
        if own_error is not None:
            raise own_error
        if isinstance(answer[0], Failure):
            raise answer[0].error()
        return answer[0]


@functools.cache
def _build(kernel: jit.Kernel, environment: Environment) -> jit.Built:
    return jit.build(kernel, jit.Gxx(environment=environment))


def describe(kernel: jit.Kernel) -> str:
    """A kernel in words that differ when anything compiled into it does."""
    return f"{kernel.name}({kernel.config}, {kernel.num_threads} threads, {ctypes.sizeof(kernel.args)} argument bytes)"


def require_same(texts: Sequence[str], complaint: str) -> None:
    """Raise EPError, naming two ranks, unless all ranks say the same."""
    for rank, text in enumerate(texts):
        if text != texts[0]:
            raise EPError(f"ranks {complaint}: rank 0: {texts[0]}; rank {rank}: {text}")


def agree(requests: list[Request | Failure]) -> list[Request]:
    """All ranks' requests, or the first rank's failure as an exception."""
    for rank, request in enumerate(requests):
        if isinstance(request, Failure):
            raise Failure(request.kind, f"rank {rank} of the group: {request.text}").error()
    good = [request for request in requests if isinstance(request, Request)]
    require_same([request.what for request in good], "launch different things")
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
