"""One rank's end of a buffer: what every call needs, and whether there can be another call."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from deep_ep import environment, installation, jit, layout, plan, sm_model, validate
from deep_ep.calls import dropped
from deep_ep.calls.agreement import Settings, agree_to_build
from deep_ep.calls.host_counts import HostCounts, Told
from deep_ep.calls.owner import Owner
from deep_ep.calls.registered import Registered
from deep_ep.errors import EPError, EPTimeoutError, WaitReport
from deep_ep.event import NOTHING, CallOrder, EventHandle, LastCall, Timing, looking
from deep_ep.handle import EPHandle
from deep_ep.machine import Machine, open_machine, raise_together
from deep_ep.machine.meeting import Limits
from deep_ep.ops import all_kernels
from deep_ep.ops.arguments import Patience, Window
from deep_ep.ops.barrier import BARRIER, BarrierArgs
from deep_ep.ops.faults import FAULT_WORDS, check_fault, take_notice
from deep_ep.topology import Topology, require_one_domain
from deep_ep.waiting import Watch, notice_seconds

logger = logging.getLogger("deep_ep")

BROKEN_SECONDS = 5.0  # how long ranks whose buffer is broken wait for each other before they give their memory back

MAX_PLANS = 1024  # kept per endpoint

Tensors = Sequence[torch.Tensor | None]
Shape = TypeVar("Shape")
Plan = TypeVar("Plan")


class Launch(NamedTuple):
    """A kernel and the shape of its launches."""

    kernel: jit.Kernel
    num_blocks: int
    shared_bytes: int


class Endpoint:
    """Where this rank's kernels run, its window, and the words in which kernels answer the host.

    Collective to build and to destroy. After a fault it refuses further calls: counters are in no known state then.

    Args:
        group: nccl with GPUs, or gloo.
        settings: the same on all ranks.
        cpu_timeout, gpu_timeout: seconds that the host, and a kernel, wait for a peer.
    """

    def __init__(self, group: dist.ProcessGroup, settings: Settings, cpu_timeout: float, gpu_timeout: float) -> None:
        installation.check()
        dropped.free_parked()
        self.environment = environment.read()
        environment.require_index_bits(self.environment)
        self.rank, self.num_ranks = group.rank(), group.size()
        self.group_ranks = tuple(dist.get_process_group_ranks(group))
        self.topology = Topology(self.num_ranks, self.rank, self.num_ranks)
        require_one_domain(self.topology, layout.MAX_RANKS)
        sizes = (settings.num_bytes, settings.num_label_bytes(self.num_ranks), settings.num_registered_bytes)
        self.layout = layout.window_layout(self.num_ranks, *sizes)
        self.owner = Owner()
        self._cpu_timeout = cpu_timeout
        self._broken: str | None = None
        self._has_launched = False  # in the call under way
        self._waited_for: set[int] = set()  # by kernels that gave notice, in the host's wait under way
        self._last_call = LastCall()
        self.plans: dict[Any, Any] = {}
        """By maker and shape; to be cleared by who changes ``roles``."""
        self.closed = False

        self.machine: Machine = open_machine(group, self.environment, Limits(cpu_timeout, gpu_timeout))
        try:
            self._build(settings, gpu_timeout)
        except BaseException:  # Ctrl-C too
            with contextlib.suppress(Exception):
                self.machine.close()
            raise

    def _build(self, settings: Settings, gpu_timeout: float) -> None:
        """All that takes a machine. Collective."""
        self._prepare_together(settings.num_registered_bytes > 0)
        number = agree_to_build(self.machine, self.group_ranks, settings, self.layout)
        self.window = self.machine.allocate_window(self.layout.total_bytes)
        registered = self.layout["registered"]
        self.registered = Registered(self.window.part(registered.offset, registered.num_bytes))
        self.device = self.machine.device
        machine = self.machine
        self.speeds = sm_model.Speeds.of(self.environment.nvlink_gbs, machine.wire_gbs, machine.memory_gbs)
        self.enough_sms = sm_model.table(self.num_ranks, self.speeds, self.most_sms)
        self.shared_limit = self.machine.shared_bytes_per_block
        self.window_argument = Window.of(self.layout, self.rank, self.window.addresses, number)
        # In time for the host too: by the kernels' notice it can say whom it has waited for.
        first_limit = min(gpu_timeout, self._cpu_timeout)
        timeout_ns, notice_ns = int(gpu_timeout * 1e9), int(notice_seconds(first_limit) * 1e9)
        gave_up = self.window.addresses[self.rank] + layout.GAVE_UP_OFFSET  # control is the first region
        self.patience_argument = Patience(self._fault.address, timeout_ns, notice_ns, gave_up)

    def _prepare_together(self, in_place: bool) -> None:
        """Compile, load and allocate what takes no peer, before the first step that does: no rank compiles while others
        wait, and what fails on one rank is told to all."""
        error = None
        try:
            self.roles = plan.ROLES[self.machine.name]
            self.machine.prepare(all_kernels(self.machine.name, in_place))
            self._fault = self.machine.host_words(2 * FAULT_WORDS)
            self.host_counts = HostCounts(self.machine.host_words(HostCounts.num_words(self.num_ranks)))
        except Exception as caught:
            error = caught
        raise_together(error, self.machine.all_gather_object)
        # Of the fault and of the notice. Every call looks at them, and NumPy takes a tenth of torch's time.
        self._fault_states = self._fault.tensor.numpy()[::FAULT_WORDS]

    def named(self, what: str) -> contextlib.AbstractContextManager[Any]:
        """An NVTX range with a name, for profilers; nothing unless EP_USE_NVIDIA_TOOLS asks for it."""
        if not self.environment.use_nvidia_tools or not torch.cuda.is_available():
            return NOTHING
        return torch.cuda.nvtx.range(f"deep_ep {what}")

    # Its life

    def usable(self) -> Endpoint:
        """This endpoint, or the reason why it can do nothing more."""
        if self.closed:
            raise ValueError("this buffer was destroyed; build a new ElasticBuffer")
        self.owner.require_here()
        if dropped.PARKED:
            dropped.free_parked()
        if self._broken is None:
            self._check_fault()
        if self._broken is not None:
            raise EPError(f"this buffer must be rebuilt on every rank: {self._broken}")
        return self

    def barrier(self, on_comm_stream: bool, host_waits: bool) -> None:
        """No rank's current stream goes on before every rank's has come here, and what the buffer launched is done.
        Collective.

        Args:
            on_comm_stream: the current stream waits for the communication stream, where the meeting takes place.
            host_waits: return when it is over.

        Raises:
            EPError: a rank called something else, did not come, or an earlier call has failed; as far as it is known.
        """
        if host_waits:
            self.refuse_capture("with_cpu_sync must be False inside a CUDA graph capture: the host cannot wait there")
        order = self.order(Timing(None, None, asynchronous=on_comm_stream, allocate_on_comm_stream=False))
        with self.breaking_on_error("barrier", order):
            args = BarrierArgs(window=self.window_argument, patience=self.patience_argument)
            self.launch(Launch(BARRIER, num_blocks=1, shared_bytes=0), args, order=order, reads=(), writes=())
            order.end((), ()).current_stream_wait()
            if host_waits and order.stream is not None:
                event = EventHandle.on(order.stream).event
                self._wait_until(lambda: event is None or event.query(), "in a barrier")  # type: ignore[no-untyped-call]
                self._check_fault()

    def destroy(self) -> None:
        """Give the memory back, after all ranks have finished with it. Collective, and safe whatever has happened
        before: to the group, which may have gone, or to a peer, for which a broken buffer does not wait long, nor one
        that is destroyed while an error is on its way. If the last call has failed and nobody was told yet, that is
        logged: it must not hide such an error.

        Raises:
            EPError: a CUDA graph is being captured; nothing has happened.
        """
        if self.closed:
            return
        if self.is_captured():
            raise EPError(
                "a deep_ep buffer cannot be destroyed inside a CUDA graph capture: the host cannot wait there; do it "
                "after the capture, when the graph is not needed any more"
            )
        self.closed = True
        is_well = False
        try:
            is_well = self._meet_at_the_end(self._finish())
        finally:
            self.give_back(together=is_well)
            dropped.free_parked()

    def _finish(self) -> bool:
        """Wait for the device; returns whether it has done all that the buffer launched, and done it well."""
        try:
            if self.machine.comm_stream is not None:
                torch.cuda.synchronize(self.device)
            return self._broken is None and not self._fault_states[0]
        except Exception as error:
            logger.warning("rank %d: waiting for %s at the end of a buffer failed: %s", self.rank, self.device, error)
            return False

    def _meet_at_the_end(self, is_well: bool) -> bool:
        """Tell the other ranks whether all is well here, and hear whether it is everywhere. Collective."""
        # With an error on its way (destroy() in a finally), peers may wait for this rank elsewhere, and do not come.
        may_come = is_well and sys.exc_info()[0] is None
        limit_s = None if may_come else min(BROKEN_SECONDS, self._cpu_timeout)
        try:
            return all(self.machine.all_gather_object(is_well, "to destroy a buffer", limit_s))
        except Exception as error:
            logger.warning("rank %d: the ranks did not meet before their memory was given back: %s", self.rank, error)
            return False

    def release(self) -> None:
        """The buffer was dropped: give its memory back without a word to the peers.

        Where kernels may still run, a later call does it (deep_ep/calls/dropped.py).
        """
        self.closed = True
        if self.machine.launches_finish:
            self.give_back(together=False)
        else:
            self._log_untold_fault()
            dropped.PARKED.append(self)

    def give_back(self, together: bool) -> None:
        """Close the machine, and its window with it: it waits for the device before. Raises nothing: whoever ends a
        buffer may have an error already, and must not get another instead of it.

        Args:
            together: all ranks are doing so, and all is well.
        """
        with contextlib.suppress(AttributeError):  # it may not have come so far
            self.registered.forget()
        try:
            self.machine.close(together=together)
        except Exception as error:
            logger.warning("rank %d: a buffer's memory was not given back: %s", self.rank, error)
        finally:
            self._log_untold_fault()

    def keep_for_good(self) -> None:
        """Never give the memory back: nobody can say whether peers still write to it."""
        dropped.ABANDONED.append(self)
        self._log_untold_fault()

    def is_captured(self) -> bool:
        """Whether a CUDA graph is being captured on the current stream; not after the device has failed."""
        try:
            return self.machine.current_capture() != 0
        except Exception as error:
            logger.warning("rank %d: whether a CUDA graph is captured cannot be seen: %s", self.rank, error)
            return False

    def refuse_capture(self, message: str) -> None:
        """Raise ValueError with ``message`` inside a CUDA graph capture."""
        if self.machine.current_capture():
            raise ValueError(message)

    def looks_at_selections(self) -> bool:
        """Whether this is the validating mode, and not a capture: looking waits for the device."""
        if self.environment.buffer_debug and self.machine.current_capture():
            logger.warning("rank %d: EP_BUFFER_DEBUG does not look at topk_idx inside a CUDA graph capture", self.rank)
            return False
        return self.environment.buffer_debug

    def looking(self, timing: Timing) -> contextlib.AbstractContextManager[Any]:
        """The context in which the arguments of a call can be looked at: they may not be there before."""
        return looking(self.machine.comm_stream, timing.previous_event)

    @contextlib.contextmanager
    def breaking_on_error(self, call: str, order: CallOrder) -> Iterator[None]:
        """From a call's first launch until it has its results: whatever ends it in between (out of memory, Ctrl-C)
        leaves counters that the next call would trip over, or this rank without what its peers have. What ends it
        before the first launch leaves nothing. Where kernels have ended by then, what they recorded is raised at the
        end; else it is for a later call to find."""
        self._has_launched = False
        try:
            yield
            if self.machine.launches_finish:
                self._check_fault()
        except BaseException as error:
            if self._has_launched:
                self._broken = self._broken or f"a {call} was left half-done ({type(error).__name__}: {error})"
                with contextlib.suppress(Exception):  # the device may be the one that has failed
                    order.abandon()
            raise

    def _check_fault(self) -> None:
        """Raise what kernels have recorded, or log which of them have waited long."""
        if not (self._fault_states[0] or self._fault_states[1]):
            return
        try:
            check_fault(self._fault.tensor, self.rank, self.machine.gone)
        except EPError as error:
            self._broken = f"an earlier call failed ({error})"
            raise
        notice = take_notice(self._fault.tensor, self.rank)
        if notice is not None:
            logger.warning("%s; it gives up after %.1f s", notice.text, self.patience_argument.timeout_ns / 1e9)
            if notice.peer is not None:
                self._waited_for.add(notice.peer)

    def _log_untold_fault(self) -> None:
        """What kernels have recorded is not lost with a buffer that nobody asks any more."""
        if self._broken is not None:
            return
        try:
            self._check_fault()
        except EPError as error:
            logger.error("the last call on a buffer that has gone had failed, and nobody was told: %s", error)
        except Exception as error:
            logger.warning("rank %d: how a buffer's last call went cannot be seen: %s", self.rank, error)

    def wait_for_counts(self, local_experts: int, alignment: int) -> Told:
        """What will arrive, once ``host_counts`` knows. Gives the GIL away if that takes long."""
        with self.named("wait for counts"):
            self._wait_until(self.host_counts.have_come, "for the counts of a dispatch")
        return self.host_counts.read(local_experts, alignment)

    def _wait_until(self, it_has_come: Callable[[], bool], what: str) -> None:
        self._waited_for.clear()

        def notice(seconds: float) -> None:
            logger.warning(
                "rank %d has waited %.1f s %s; it gives up after %.1f s", self.rank, seconds, what, self._cpu_timeout
            )

        watch = Watch(self._cpu_timeout, notice)
        while not it_has_come():
            self._go_on_waiting(watch, what)

    def _go_on_waiting(self, watch: Watch, what: str) -> None:
        """Between two looks of the host at what it waits for."""
        self._check_fault()
        if watch.is_over:
            self._broken = f"the host waited in vain {what} for {watch.limit_s} s"
            peers = tuple(sorted(self._waited_for))
            whom = ", while its kernels waited for rank " + " and ".join(map(str, peers)) if peers else ""
            raise EPTimeoutError(
                f"rank {self.rank} waited {watch.limit_s} s {what}{whom}; every rank must make the same calls. Destroy "
                "this buffer on every rank and build a new one; num_cpu_timeout_secs sets the limit",
                WaitReport(self.rank, what, peers, watch.seconds),
            )
        watch.pause()

    # What calls have in common: first their checks, then their launches

    def own_handle(self, handle: Any) -> EPHandle:
        """Raise unless a dispatch of this rank, in a group of the same ranks, made the handle."""
        return validate.is_own_handle(handle, self.group_ranks, self.rank, self.device)

    def require_room(
        self, max_tokens: int, record: layout.Record, rows_of_token: int | None = None, num_labels: int = 0
    ) -> None:
        """Raise ValueError unless the window holds what so many tokens need.

        Args:
            rows_of_token: if they come in a record each, whoever sends them; else a record a token of each source.
            num_labels: selections of a token that is dispatched.
        """
        if not self.layout.fits(max_tokens, record, rows_of_token):
            what = f"{record.row_bytes} bytes a token"
            if rows_of_token:
                what = f"{rows_of_token} rows of {record.row_bytes} bytes a token (allow_multiple_reduction is False)"
            raise ValueError(
                f"num_max_tokens_per_rank {max_tokens} with {what} and {self.num_ranks} ranks does not fit into a "
                f"buffer of {self.layout.num_bytes} bytes; ElasticBuffer.get_buffer_size_hint says how many it takes"
            )
        if not self.layout.fits(max_tokens, record, rows_of_token, num_labels):
            labels = self.layout["labels"].num_bytes // (self.num_ranks * layout.LABEL_BYTES)
            raise ValueError(
                f"num_max_tokens_per_rank {max_tokens} with num_topk {num_labels} makes {max_tokens * num_labels} "
                f"selections of a rank, but the buffer has room for {labels}; build it with a num_max_tokens_per_rank "
                "and a num_topk that make as many"
            )

    def planned(self, make: Callable[[Endpoint, Shape], Plan], shape: Shape) -> Plan:
        """``make(self, shape)``, worked out once."""
        plan: Plan | None = self.plans.get((make, shape))
        if plan is None:
            if len(self.plans) >= MAX_PLANS:
                self.plans.clear()
            plan = self.plans[make, shape] = make(self, shape)
        return plan

    def num_sms(self, given: Any, kind: sm_model.Kind, num_topk: int, num_tokens: int) -> int:
        """SMs of a call; 0 stands for the analytic choice."""
        num_sms = validate.is_count("num_sms", given, 0)
        if num_sms == 0:
            return max(self.enough_sms[kind][num_topk], min(sm_model.of_few(kind, num_tokens), self.most_sms))
        if self.machine.name == "cuda":
            validate.is_count("num_sms", num_sms, 1, self.most_sms, "a call on this device takes no more")
        return num_sms

    @property
    def most_sms(self) -> int:
        """What a call can use: all that the device has, as far as the window has room for what blocks count."""
        return min(self.machine.num_sms, layout.MAX_BLOCKS)

    def num_blocks(self, num_sms: int) -> int:
        """Of a launch: a block an SM, while there are any."""
        return min(num_sms, self.machine.num_sms)

    def order(self, timing: Timing) -> CallOrder:
        """The place of a call that starts now: after the one before it, whatever streams the two run on."""
        keep = self.environment.avoid_record_stream
        order = CallOrder(self.machine.comm_stream, timing.previous_event, timing.asynchronous, keep)
        order.begin(self._last_call, self.machine.current_capture())
        return order

    def launch(
        self,
        launch: Launch,
        args: Any,
        *,
        order: CallOrder,
        reads: Tensors,
        writes: Tensors,
        meets_peers: bool = True,
    ) -> None:
        """Launch a call, or a part of it; see Machine.launch."""
        self._has_launched = True
        self.machine.launch(
            launch.kernel,
            args,
            num_blocks=launch.num_blocks,
            shared_bytes=launch.shared_bytes,
            stream=order.stream,
            reads=reads,
            writes=writes,
            meets_peers=meets_peers,
        )
