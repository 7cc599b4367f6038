"""One rank's end of a buffer: what every call needs, and whether there can be another call."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from deep_ep import environment, layout, plan, validate
from deep_ep.errors import EPError, EPTimeoutError
from deep_ep.event import CallOrder, Timing
from deep_ep.handle import EPHandle
from deep_ep.jit import Kernel
from deep_ep.machine import Machine, open_machine
from deep_ep.ops import all_kernels
from deep_ep.ops.arguments import FaultRecord, Patience, Window
from deep_ep.ops.faults import check_fault
from deep_ep.topology import Topology, require_one_domain

logger = logging.getLogger("deep_ep")

ABANDONED: list[Endpoint] = []  # whose memory is kept to the process's end
HOST_COUNTS = 2  # host words before the experts' counts: ready, rows

Tensors = Sequence[torch.Tensor | None]


class Half(enum.Enum):
    """What a launch does of a call."""

    SEND = enum.auto()
    RECEIVE = enum.auto()
    BOTH = enum.auto()


class Endpoint:
    """Where this rank's kernels run, its window, and the words in which kernels answer the host.

    Collective to build and to destroy. After a fault it refuses further calls: counters are in no known state then.

    Args:
        group: nccl with GPUs, or gloo.
        num_bytes: of the window.
        cpu_timeout, gpu_timeout: seconds that the host, and a kernel, wait for a peer.
    """

    def __init__(self, group: dist.ProcessGroup, num_bytes: int, cpu_timeout: float, gpu_timeout: float) -> None:
        self.environment = environment.read()
        self.rank, self.num_ranks = group.rank(), group.size()
        self.group_ranks = tuple(dist.get_process_group_ranks(group))
        self.topology = Topology(self.num_ranks, self.rank, self.num_ranks)
        require_one_domain(self.topology, layout.MAX_RANKS)
        self.layout = layout.window_layout(self.num_ranks, num_bytes)
        self._cpu_timeout = cpu_timeout
        self._broken: str | None = None
        self._last_stream: torch.cuda.Stream | None = None
        self.closed = False

        self.machine: Machine = open_machine(group, self.environment)
        try:
            self.roles = plan.ROLES[self.machine.name]
            self.machine.prepare(all_kernels(self.machine.name))
            self.window = self.machine.allocate_window(num_bytes)
            self._fault = self.machine.host_words(ctypes.sizeof(FaultRecord) // 4)
            self._counts = self.machine.host_words(HOST_COUNTS + layout.MAX_EXPERTS // self.num_ranks)
        except Exception:
            self.machine.close()
            raise
        self.device = self.machine.device
        self.shared_limit = self.machine.shared_bytes_per_block
        self.window_argument = Window.of(self.layout, self.rank, self.window.addresses)
        self.patience_argument = Patience(self._fault.address, int(gpu_timeout * 1e9))

    # Its life

    def usable(self) -> Endpoint:
        """This endpoint, or the reason why it can do nothing more."""
        if self.closed:
            raise ValueError("this buffer was destroyed; build a new ElasticBuffer")
        if self._broken is None:
            self._check_fault()
        if self._broken is not None:
            raise EPError(f"this buffer must be rebuilt on every rank: {self._broken}")
        return self

    def barrier(self, stream: torch.cuda.Stream | None) -> None:
        """Return when every rank's ``stream`` is idle. Collective.

        Raises:
            EPTimeoutError: a call before this one has failed; every rank has passed the barrier.
        """
        self.refuse_capture("barrier() waits on the host, which a CUDA graph capture does not allow")
        if stream is not None:
            stream.synchronize()
        self.machine.barrier()
        self._check_fault()

    def destroy(self) -> None:
        """Give the memory back, after all ranks have finished with it. Collective, whatever has happened before: ranks
        that failed and ranks that did not meet here, before they build anew. (Where a rank has died, the meeting ends
        as the group's own time limit says.)

        Raises:
            EPTimeoutError: the last call has failed and nobody had asked yet; the memory has been given back.
        """
        if self.closed:
            return
        self.closed = True
        try:
            if self.machine.comm_stream is not None:
                torch.cuda.synchronize(self.device)
            if dist.is_initialized():
                self.machine.barrier()
        except Exception as error:
            logger.warning("rank %d: the ranks did not meet before their memory was given back: %s", self.rank, error)
        finally:
            fault_words = self._fault.tensor.clone()
            self.window.close()
            self.machine.close()
        if self._broken is None:
            check_fault(fault_words, self.rank)

    def release(self) -> None:
        """Give the memory back without a word to the peers; while a CUDA graph is being captured, keep it for good."""
        if self._is_capturing():
            self.keep_for_good()
            return
        self.closed = True
        with contextlib.suppress(Exception):
            self.window.close()
            self.machine.close()

    def keep_for_good(self) -> None:
        """Never give the memory back: nobody can say whether peers still write to it."""
        ABANDONED.append(self)

    def _is_capturing(self) -> bool:
        return self.machine.name == "cuda" and torch.cuda.is_current_stream_capturing()

    def refuse_capture(self, message: str) -> None:
        """Raise ValueError with ``message`` inside a CUDA graph capture."""
        if self._is_capturing():
            raise ValueError(message)

    @contextlib.contextmanager
    def breaking_on_error(self, call: str) -> Iterator[None]:
        """From a call's first launch to its last: whatever ends it in between (out of memory, Ctrl-C) leaves counters
        that the next call would trip over."""
        try:
            yield
        except BaseException as error:
            self._broken = self._broken or f"a {call} was left half-done ({type(error).__name__}: {error})"
            raise

    def _check_fault(self) -> None:
        try:
            check_fault(self._fault.tensor, self.rank)
        except EPTimeoutError as error:
            self._broken = f"an earlier call failed ({error})"
            raise

    # What calls have in common: first their checks, then their launches

    def own_handle(self, handle: Any) -> EPHandle:
        """Raise unless a dispatch of this rank, in a group of the same ranks, made the handle."""
        if not isinstance(handle, EPHandle):
            raise TypeError(f"handle must be the EPHandle that dispatch returned, but it is a {type(handle).__name__}")
        if handle.group_ranks != self.group_ranks or handle.rank != self.rank:
            raise ValueError(
                f"handle belongs to rank {handle.rank} of a group of ranks {list(handle.group_ranks)}, this buffer to "
                f"rank {self.rank} of {list(self.group_ranks)}; use it with a buffer of the group that dispatched"
            )
        if handle.topk_idx.device != self.device:
            raise ValueError(f"handle lies on {handle.topk_idx.device}, this buffer's kernels run on {self.device}")
        return handle

    def fitting_tokens(self, max_tokens: Any, num_tokens: int, record: layout.Record) -> int:
        """``max_tokens``, after seeing that the call has no more and that the window holds so many of each source."""
        advice = "give it to the buffer or to the call"
        validate.is_count("num_max_tokens_per_rank", max_tokens, 1, advice=advice)
        if num_tokens > max_tokens:
            raise ValueError(
                f"x has {num_tokens} tokens but num_max_tokens_per_rank is {max_tokens}; raise it on every rank or "
                "split the call"
            )
        if not self.layout.fits(max_tokens, record):
            raise ValueError(
                f"num_max_tokens_per_rank {max_tokens} with {record.row_bytes} bytes a token and {self.num_ranks} "
                f"ranks does not fit into a buffer of {self.layout.num_bytes} bytes; "
                "ElasticBuffer.get_buffer_size_hint says how many it takes"
            )
        return int(max_tokens)

    def num_sms(self, given: Any) -> int:
        """SMs of a call; 0 stands for the analytic choice."""
        validate.is_count("num_sms", given, 0)
        if given == 0:
            return min(plan.theoretical_num_sms(self.num_ranks), self.machine.num_sms)
        if self.machine.name == "cuda":
            most = min(self.machine.num_sms, layout.MAX_BLOCKS)
            validate.is_count("num_sms", given, 1, most, "this device has no more")
        return int(given)

    def order(self, timing: Timing) -> CallOrder:
        """The place of a call that starts now: after the one before it, whatever streams the two run on."""
        keep = self.environment.avoid_record_stream
        order = CallOrder(self.machine.comm_stream, timing.previous_event, timing.asynchronous, keep)
        order.begin(self._last_stream)
        self._last_stream = order.stream
        return order

    def launch(
        self,
        kernel: Kernel,
        args: Any,
        *,
        roles: plan.Roles,
        half: Half,
        num_sms: int,
        shared_bytes: int,
        order: CallOrder,
        reads: Tensors,
        writes: Tensors,
    ) -> None:
        """Launch a call, or a half of it, on ``num_sms`` blocks. Sets the argument ``num_send_blocks``."""
        num_blocks = min(num_sms, self.machine.num_sms)
        for args.num_send_blocks in num_send_blocks_of_launches(roles, half, num_blocks):
            self.machine.launch(
                kernel,
                args,
                num_blocks=num_blocks,
                shared_bytes=shared_bytes,
                stream=order.stream,
                reads=[tensor for tensor in reads if tensor is not None],
                writes=[tensor for tensor in writes if tensor is not None],
            )

    # Counts that come before the tokens

    def expect_counts(self) -> int:
        """Forget the last call's counts; returns the address to which a kernel writes this call's."""
        self._counts.tensor[0] = 0
        return self._counts.address

    def wait_for_counts(self, local_experts: int) -> tuple[int, list[int]]:
        """Rows that will arrive, and selections of each local expert. Gives the GIL away while it waits."""
        words = self._counts.tensor.numpy()
        deadline = time.monotonic() + self._cpu_timeout
        while words[0] == 0:
            self._check_fault()
            if time.monotonic() > deadline:
                self._broken = f"the counts of a dispatch did not come within {self._cpu_timeout} s"
                raise EPTimeoutError(
                    f"rank {self.rank} waited {self._cpu_timeout} s for the counts of a dispatch; every rank must call "
                    "dispatch. Destroy this buffer on every rank and build a new one; num_cpu_timeout_secs sets the "
                    "limit"
                )
            time.sleep(0)
        return int(words[1]), words[HOST_COUNTS : HOST_COUNTS + local_experts].tolist()


def num_send_blocks_of_launches(roles: plan.Roles, half: Half, num_blocks: int) -> list[int]:
    """How many of a launch's blocks send, for each launch that the work takes; the others receive."""
    if half is Half.SEND:
        return [num_blocks]
    if half is Half.RECEIVE:
        return [0]
    if num_blocks == 1:  # one block cannot do both: one launch after the other
        return [1, 0]
    return [roles.num_send_blocks(num_blocks)]
