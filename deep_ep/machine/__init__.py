"""Where kernels run: one small protocol, and a CUDA device (cuda.py, nccl.py) or simulated ranks behind it."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from deep_ep.environment import Environment
from deep_ep.errors import EPEnvironmentError, EPError
from deep_ep.machine.meeting import Limits

if TYPE_CHECKING:
    from deep_ep.jit import Kernel

T = TypeVar("T")


class Window(Protocol):
    """Memory of one rank that every rank's kernels reach; collectively allocated, zeroed before any peer can see it."""

    addresses: tuple[int, ...]
    """The base of every rank's window, by rank, as this rank's kernels see it."""
    num_bytes: int

    def part(self, offset: int, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8: a part of this rank's memory, to be used like any other tensor of the device. Peers'
        kernels see what it held when this rank launched something that reads it."""

    def close(self) -> None:
        """Give the memory back. Local, idempotent: the caller has made sure that no rank's kernel uses it any more."""


class HostWords(Protocol):
    """Words that a kernel writes and the host polls."""

    tensor: torch.Tensor
    """[count] int32 on the CPU."""
    address: int
    """What a kernel's argument holds to reach the words."""

    def close(self) -> None:
        """Give the memory back; idempotent."""


class Machine(Protocol):
    """One rank's view of the place where the group's kernels run.

    ``launch`` may be asynchronous (a CUDA stream) or synchronous and collective (simulated ranks); callers do on every
    rank the same things in the same order, and so never need to know which.
    """

    name: str
    """"cuda" or "simulated"."""
    device: torch.device
    rank: int
    num_ranks: int
    num_sms: int
    wire_gbs: float | None
    """GB/s of all links of this rank's GPU together, in one direction; None where nobody can tell."""
    memory_gbs: float | None
    """GB/s that the memory of this rank's GPU is made for; None where nobody can tell."""
    shared_bytes_per_block: int
    """The most dynamic shared memory that a block can have."""
    comm_stream: Any
    """The machine's own torch.cuda.Stream for communication, or None where there are no streams."""
    gone: Mapping[int, str]
    """Peers that are known to come to no launch any more, and why ("has died")."""
    launches_finish: bool
    """Whether a kernel has ended when ``launch`` returns: then its call can tell at once how it went."""

    def allocate_window(self, num_bytes: int) -> Window:
        """Allocate ``num_bytes`` on every rank. Collective.

        Raises:
            ValueError: the ranks ask for different sizes.
            EPTopologyError: some ranks cannot reach each other by load and store.
        """

    def host_words(self, count: int) -> HostWords:
        """Allocate ``count`` zeroed words. Local."""

    def prepare(self, kernels: Iterable[Kernel]) -> None:
        """Compile and load, so that no rank compiles while its peers already wait in a collective step.

        Call it on every rank with the same kernels.

        Raises:
            EPCompileError: a kernel does not compile.
        """

    def launch(
        self,
        kernel: Kernel,
        args: ctypes.Structure,
        *,
        num_blocks: int,
        shared_bytes: int,
        stream: Any,
        reads: Sequence[torch.Tensor | None],
        writes: Sequence[torch.Tensor | None],
        meets_peers: bool = True,
    ) -> None:
        """Launch a kernel.

        Args:
            kernel: what to run; compiled now if ``prepare`` has not seen it.
            args: its argument structure. Pointers are ``c_void_p`` fields, nested as deep as you like.
            num_blocks: blocks of ``kernel.num_threads`` threads.
            shared_bytes: dynamic shared memory of a block.
            stream: a torch.cuda.Stream or its integer handle; None is the current stream.
            reads: every tensor that ``args`` points into and the kernel only reads; None stands for no tensor.
            writes: every tensor that ``args`` points into and the kernel writes; the same.
            meets_peers: peers launch something at the same time, and the kernels wait for each other. False: what this
                one waits for comes from launches before it.
        """

    def current_capture(self) -> int:
        """The number of the CUDA graph capture that this device's current stream takes part in; 0 if there is none."""

    def meet(self, what: str, limit_s: float | None = None) -> None:
        """Return when every rank's host is here. Collective.

        Args:
            what: names the step, in an infinitive ("to destroy a buffer"); the same on all ranks.
            limit_s: how long to wait; None is the machine's limit.

        Raises:
            EPTimeoutError: naming the ranks that did not come.
        """

    def all_gather_object(self, value: T, what: str, limit_s: float | None = None) -> list[T]:
        """Give every rank every rank's value, by rank. Collective; for agreement at set-up, not for the fast path.

        Args:
            what, limit_s: as in ``meet``, which raises the same.
        """

    def close(self, *, together: bool = False) -> None:
        """Give everything back, windows too, when the device has done what was launched. Local, idempotent, safe after
        the group is destroyed.

        Args:
            together: every rank is closing its machine now, and nothing has gone wrong before.
        """


def open_machine(group: dist.ProcessGroup, environment: Environment, limits: Limits) -> Machine:
    """The machine of a group: its GPUs where it has an nccl backend, else simulated ranks over gloo. Collective.

    Args:
        group: a process group, or a subgroup, that this rank belongs to.
        environment: the settings of the buffer that will use the machine.
        limits: how long ranks wait for each other.

    Raises:
        EPTimeoutError: some ranks did not come.
        TypeError, ValueError: ``group`` is no process group, not this rank's, or has neither nccl nor gloo.
        EPEnvironmentError: driver, device, NCCL or a package is missing, too old or contradictory.
        EPTopologyError: some ranks cannot reach each other by load and store.
    """
    backends = backends_of(group)
    if backends.get("cuda") == "nccl" and torch.cuda.is_available():
        from deep_ep.machine.cuda import CudaMachine

        return CudaMachine(group, environment, limits)
    if backends.get("cpu") == "gloo":
        from deep_ep.machine.simulated import SimulatedMachine

        return SimulatedMachine(group, environment, limits)
    raise ValueError(
        f"group has the backends {backends}, and torch.cuda.is_available() is {torch.cuda.is_available()}; deep_ep "
        "needs nccl with GPUs, or gloo for simulated ranks: init_process_group('nccl') or init_process_group('gloo')"
    )


def do_together(
    step: Callable[[], T],
    all_gather_object: Callable[[str | None, str], list[str | None]],
    kind: type[EPError] = EPError,
) -> T:
    """Take a step that may fail on one rank alone; then all raise, as in raise_together. Collective."""
    try:
        result = step()
    except Exception as error:
        raise_together(error, all_gather_object, kind)
        raise
    raise_together(None, all_gather_object, kind)
    return result


def raise_together(
    error: Exception | None,
    all_gather_object: Callable[[str | None, str], list[str | None]],
    kind: type[EPError] = EPError,
) -> None:
    """End a step that each rank took alone: if it failed on any of them, all raise. Collective.

    Without it a rank that failed would leave its peers waiting in the next collective step.

    Args:
        error: of this rank, which raises it again.
        all_gather_object: of a machine.
        kind: what the others raise, naming the first rank that failed.
    """
    text = None if error is None else f"{type(error).__name__}: {error}"
    try:
        texts = all_gather_object(text, "to say whether it is well")
    except EPError:
        if error is None:
            raise
        # Peers that are still in the midst of the step do not come. Why it failed here says more.
        raise error from None
    if error is not None:
        raise error
    for rank, text in enumerate(texts):
        if text is not None:
            raise kind(f"rank {rank} of the group cannot take part: {text}")


def backends_of(group: object) -> dict[str, str]:
    """The backend of each device type: {"cpu": "gloo", "cuda": "nccl"}."""
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group does not contain this rank; build the buffer on the ranks of the group only")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup, but it is a {type(group).__name__}")
    pairs = (pair.split(":") for pair in dist.get_backend_config(group).split(","))
    return {device.strip(): backend.strip() for device, backend in pairs}


def import_cuda_extra(module: str) -> Any:
    """Import a module that only GPU installations have.

    Raises:
        EPEnvironmentError: it is missing or does not load; the message holds the line that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EPEnvironmentError(f"{module} cannot be imported ({error}); pip install 'deep_ep[cu13]'") from error
