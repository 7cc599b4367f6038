"""ElasticBuffer: the public class. What a call does is in deep_ep/calls."""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from deep_ep import layout, plan, sm_model, validate
from deep_ep.calls import dropped, registered
from deep_ep.calls.agreement import Settings
from deep_ep.calls.combine import AskedCombine, CombineResult, check_combine, run_combine
from deep_ep.calls.dispatch import AskedDispatch, DispatchResult, TokensOrPair, check_dispatch, run_dispatch
from deep_ep.calls.endpoint import Endpoint
from deep_ep.domains import size_of
from deep_ep.event import EventHandle, EventOverlap, Timing
from deep_ep.handle import EPHandle
from deep_ep.later import Later
from deep_ep.sm_model import Kind

logger = logging.getLogger("deep_ep")


_KEYS = itertools.count()
_BUFFERS: weakref.WeakValueDictionary[int, ElasticBuffer] = weakref.WeakValueDictionary()


def buffer_of(key: int) -> ElasticBuffer:
    """The buffer of this process that has this number."""
    buffer = _BUFFERS.get(key)
    if buffer is None:
        raise ValueError("the buffer of this operation is gone: keep it as long as its results and their gradients")
    return buffer


class ElasticBuffer(Later):
    """The memory and the kernels with which the ranks of a group exchange tokens.

    Building one is collective over ``group``, which may be a subgroup of the world. One buffer serves any hidden size,
    number of selections and number of experts that fits into it (``num_max_tokens_per_rank`` times ``num_topk``
    selections of a rank, if they size it).

    Args:
        group: nccl with GPUs, or gloo: then ranks are simulated, with the same calls, results and errors.
        num_bytes: of the window, a multiple of 2 MiB; or None, to be worked out from the settings that follow.
        num_max_tokens_per_rank: the most tokens that any rank dispatches in one call.
        hidden: elements of a token.
        num_topk: selections of a token; 0 stands for "unknown, up to 32".
        allow_multiple_reduction: combine adds a rank's expanded rows of a token there, and they travel as one. False:
            they travel one by one (the window makes room for that) and are added in the order of the selections.
        use_fp8_dispatch: changes nothing: what combine sends is bfloat16 and larger than any dispatch of FP8, so a
            window that holds the one holds the other.
        num_cpu_timeout_secs, num_gpu_timeout_secs: how long the host, or a kernel, waits for a peer.
        explicitly_destroy: the caller promises to call destroy(); a buffer that is dropped without it is logged.
        num_registered_bytes: memory for registered_empty(), beside ``num_bytes``; the same on all ranks.

    The other settings are accepted as DeepEP V2 has them; results are deterministic whatever ``deterministic`` says.

    Threads may share a buffer: a call waits until that of another thread has returned.

    Raises:
        ValueError, TypeError: an argument.
        EPEnvironmentError, EPTopologyError, EPCompileError: this host or this group cannot run the kernels.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: float = 300,
        num_gpu_timeout_secs: float = 100,
        explicitly_destroy: bool = False,
        num_registered_bytes: int = 0,
    ) -> None:
        self._endpoint: Endpoint | None = None  # __del__ may look before there is one
        self.explicitly_destroy = explicitly_destroy
        num_ranks = size_of(group)
        validate.are_flags(
            use_fp8_dispatch=use_fp8_dispatch,
            deterministic=deterministic,
            allow_hybrid_mode=allow_hybrid_mode,
            allow_multiple_reduction=allow_multiple_reduction,
            prefer_overlap_with_compute=prefer_overlap_with_compute,
            explicitly_destroy=explicitly_destroy,
        )
        validate.is_count("num_cpu_bytes", num_cpu_bytes, 0)
        validate.is_count("sl_idx", sl_idx, 0, validate.MAX_SERVICE_LEVEL)
        num_allocated_qps = validate.is_count("num_allocated_qps", num_allocated_qps, 0)
        num_max_tokens_per_rank = validate.is_max_tokens(num_max_tokens_per_rank, 0)
        sized_by_topk = None
        if num_bytes is None:
            settings = validate.window_settings(num_max_tokens_per_rank, hidden, num_topk)
            num_bytes = layout.window_bytes(num_ranks, *settings, allow_multiple_reduction)
            sized_by_topk = settings[2]
        num_bytes = validate.is_count("num_bytes", num_bytes, layout.WINDOW_ALIGNMENT)
        most = registered.MOST_BYTES
        num_registered_bytes = validate.is_count("num_registered_bytes", num_registered_bytes, 0, most)

        self.group = group
        self.num_bytes = num_bytes
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.allow_hybrid_mode = allow_hybrid_mode
        self.allow_multiple_reduction = allow_multiple_reduction
        self.prefer_overlap_with_compute = prefer_overlap_with_compute
        self.deterministic = deterministic
        self.num_allocated_qps = num_allocated_qps
        cpu_timeout = validate.is_timeout("num_cpu_timeout_secs", num_cpu_timeout_secs)
        gpu_timeout = validate.is_timeout("num_gpu_timeout_secs", num_gpu_timeout_secs)
        settings_of_all = Settings(
            num_bytes, num_max_tokens_per_rank, allow_multiple_reduction, sized_by_topk, num_registered_bytes
        )
        self._endpoint = Endpoint(group, settings_of_all, cpu_timeout, gpu_timeout)
        # What operators of torch know a buffer by, and tracers can read (autograd.py).
        self._key = next(_KEYS)
        _BUFFERS[self._key] = self
        self._group_ranks, enough_sms = self._endpoint.group_ranks, self._endpoint.enough_sms
        self._num_sms = enough_sms[Kind.DISPATCH], enough_sms[Kind.EXPANDED_DISPATCH]
        topology = self._endpoint.topology
        self.rank_idx, self.num_ranks = topology.rank, topology.num_ranks
        self.num_scaleout_ranks = self.num_rdma_ranks = topology.num_scaleout_ranks
        self.num_scaleup_ranks = self.num_nvlink_ranks = topology.num_scaleup_ranks
        self.scaleout_rank_idx, self.scaleup_rank_idx = topology.scaleout_rank, topology.scaleup_rank
        if self._endpoint.environment.buffer_debug:
            name = self._endpoint.machine.name
            logger.info("rank %d: buffer on %s\n%s", self.rank_idx, name, self.memory_report())

    # Sizes and domains

    @staticmethod
    def get_buffer_size_hint(
        group: dist.ProcessGroup,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        """The ``num_bytes`` that these settings need, a multiple of 2 MiB. Needs no buffer and talks to nobody."""
        validate.are_flags(
            use_fp8_dispatch=use_fp8_dispatch,
            allow_hybrid_mode=allow_hybrid_mode,
            allow_multiple_reduction=allow_multiple_reduction,
        )
        settings = validate.window_settings(num_max_tokens_per_rank, hidden, num_topk)
        return layout.window_bytes(size_of(group), *settings, allow_multiple_reduction, sizes_are_told=False)

    @staticmethod
    def capture() -> EventHandle:
        """An event recorded on the current stream."""
        return EventHandle()

    def memory_report(self) -> str:
        """Each region of this rank's window: bytes and purpose, a line each; in all, with what lies between them."""
        regions = self._end().layout.regions
        lines = [f"{region.num_bytes:>14,}  {region.name:<10} {region.purpose}" for region in regions]
        return "\n".join([*lines, f"{self._end().layout.total_bytes:>14,}  in all"])

    def registered_empty(self, size: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """A tensor in registered memory, for calls with ``zero_copy``: peers read its rows where they lie, and nobody
        sends them. Make such tensors once, and use them again in each call: their memory is never taken back while the
        buffer lives. What it holds is undefined. Talks to nobody.

        A tensor may be written again, by whatever follows in the stream's order, once a call that was given it has
        ended (``event``, if it was asynchronous); peers have read it then. After destroy() it can still be read and
        written; it holds all of the buffer's memory, which is unmapped with the last such tensor: not before the device
        has done with it, and not inside a CUDA graph capture.

        Args:
            size: lengths of all dimensions.

        Raises:
            ValueError, TypeError: an argument, or more bytes than are left of ``num_registered_bytes``.
        """
        endpoint = self._usable()
        with endpoint.owner.turn:
            return endpoint.registered.empty(size, dtype)

    def get_comm_stream(self) -> torch.cuda.Stream | None:
        """The stream that kernels run on; None on simulated ranks."""
        stream: torch.cuda.Stream | None = self._usable().machine.comm_stream
        return stream

    def get_physical_domain_size(self) -> tuple[int, int]:
        """(RDMA ranks, NVLink ranks)."""
        return self.num_rdma_ranks, self.num_nvlink_ranks

    def get_logical_domain_size(self) -> tuple[int, int]:
        """(scale-out ranks, scale-up ranks)."""
        return self.num_scaleout_ranks, self.num_scaleup_ranks

    def get_theoretical_num_sms(
        self,
        num_experts: int,
        num_topk: int,
        num_scaleout_topk: int = 0,
        rdma_gbs: float = 0,
        nvlink_gbs: float = 0,
        sm_read_gbs: float = 200,
        sm_write_gbs: float = 50,
    ) -> int:
        """SMs with which a dispatch keeps the link full (deep_ep/sm_model.py), or the most that a call takes on this
        device, if that is less; even, at least 4. With ``num_sms=0`` a plain dispatch takes these, other calls theirs.

        Args:
            num_experts, num_topk: do not matter inside one domain, where each row crosses the link once.
            num_scaleout_topk, rdma_gbs: do not matter without a network.
            nvlink_gbs: GB/s that kernels reach over the GPU's links in one direction; 0 stands for EP_NVLINK_GBS, or
                what NVML tells of the links.
            sm_read_gbs, sm_write_gbs: GB/s of one SM; in proportion to 200 and 50, those that the model knows.
        """
        speeds = {"nvlink_gbs": nvlink_gbs, "sm_read_gbs": sm_read_gbs, "sm_write_gbs": sm_write_gbs}
        for name, gbs in speeds.items():
            validate.is_speed(name, gbs, may_be_0=name == "nvlink_gbs")
        endpoint = self._end()
        told = endpoint.speeds.as_told(nvlink_gbs, sm_read_gbs, sm_write_gbs)
        num_sms = sm_model.num_sms(Kind.DISPATCH, self.num_ranks, 1, told)
        return min(num_sms, endpoint.most_sms - endpoint.most_sms % 2)

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """Queue pairs that a call of ``num_sms`` SMs uses: none inside one NVLink domain."""
        return plan.theoretical_num_qps(validate.is_count("num_sms", num_sms, 0))

    # Calls

    def dispatch(
        self,
        x: TokensOrPair,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventOverlap | EventHandle | None = None,
        previous_event_before_epilogue: EventOverlap | EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
        zero_copy: bool = False,
    ) -> DispatchResult:
        """Send every token to each rank that holds one of its experts, once.

        Args:
            x: [T, H] bfloat16; or a pair: [T, H] float8_e4m3fn and its scale factors [T, P] (float32, or int32 that
                packs four UE8M0) of any strides. T may be 0 and differ by rank, rows are multiples of 16 bytes.
            topk_idx: [T, K] topk_idx_t, experts of each token; -1 is "no expert".
            topk_weights: [T, K] float32, carried and not multiplied in.
            cumulative_local_expert_recv_stats: [L] int32, to which the selections that each local expert received are
                added.
            num_experts: of all ranks together; expert e lives on rank e // (num_experts / num_ranks).
            num_max_tokens_per_rank: M, the same on all ranks; None is the buffer's.
            expert_alignment: what counts per expert are rounded up to; None is 1.
            num_sms: all SMs that this call may hold, and its combine unless that is told otherwise; 0 is the analytic
                choice, for each call its own. More than the device has are refused; on simulated ranks, which have few,
                they count as all there are.
            num_qps: accepted; there are no queue pairs inside one NVLink domain.
            previous_event: what kernels wait for instead of the current stream.
            previous_event_before_epilogue: waited for before output tensors are written.
            async_with_compute_stream: leave it to ``event`` to make the current stream wait.
            handle: of an earlier dispatch, whose routing is used again: no counts travel, the host waits for nothing,
                and sizes are the handle's. topk_idx is None then, and other arguments that the handle knows are left
                out or the same. The layout is what ``do_expand`` says now, and the handle follows it.
            do_handle_copy: False lets the handle hold ``topk_idx`` itself: do not change it while the handle is used.
            do_cpu_sync: True (the default): wait for the counts and return exact sizes, with memory for a few more rows
                behind them. False: R*M rows, nothing blocks; rows past the real count have recv_topk_idx -1.
            do_expand: one row for each (token, local expert), grouped by expert; each group starts at a multiple of
                ``expert_alignment`` and is ordered by (source rank, token).
            do_zero_padding: fill the rows between the groups of the expanded layout with zeros, weights and scale
                factors too.
            use_tma_aligned_col_major_sf: give received scale factors strides (1, rows aligned to 4), not (P, 1).
            zero_copy: x (and its scale factors) lie in registered memory (registered_empty), contiguous, and peers read
                them there. The same on all ranks, as is do_cpu_sync then.

        Returns:
            ``(recv_x [N, H], recv_topk_idx [N, K], recv_topk_weights [N, K] or None, handle, event)``, rows ordered by
            (source rank, token); recv_topk_idx holds local experts or -1. recv_x is a pair where x is one. Expanded:
            recv_x is [X, H], recv_topk_idx None, recv_topk_weights [X].

        Raises:
            ValueError, TypeError: an argument; nothing was launched.
            EPTimeoutError, EPError: a peer did not come, or called something else; on GPUs a later call says so, unless
                this one waits for counts (docs/guide.md, "When something goes wrong").
        """
        endpoint = self._usable()
        timing = Timing(
            previous_event, previous_event_before_epilogue, async_with_compute_stream, allocate_on_comm_stream
        )
        validate.is_count("num_qps", num_qps, 0)
        asked = AskedDispatch(
            x,
            topk_idx,
            topk_weights,
            cumulative_local_expert_recv_stats,
            num_experts,
            num_max_tokens_per_rank,
            self.num_max_tokens_per_rank,
            expert_alignment,
            num_sms,
            handle,
            do_handle_copy,
            do_cpu_sync,
            do_expand,
            do_zero_padding,
            use_tma_aligned_col_major_sf,
            zero_copy,
            timing,
        )
        request = check_dispatch(endpoint, asked)
        with endpoint.owner.turn, endpoint.named("dispatch"):
            return run_dispatch(endpoint.usable(), request)

    def combine(
        self,
        x: torch.Tensor,
        handle: EPHandle,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | Sequence[torch.Tensor] | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventOverlap | EventHandle | None = None,
        previous_event_before_epilogue: EventOverlap | EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        zero_copy: bool = False,
    ) -> CombineResult:
        """Send every row home and add the rows of each token.

        The sum is float32: biases first, then the ranks in the order in which each one's last selected expert appears
        among the token's selections, starting from +0; one rounding to bfloat16. It is the same on every machine and
        for every SM count. Expanded rows of a token are added on their rank first, in the order of its selections, and
        rounded; or, with a buffer whose ``allow_multiple_reduction`` is False, all in the order of the selections.

        Args:
            x: [N, H] bfloat16, rows as dispatch returned them; [X, H] if ``handle.do_expand``.
            handle: of that dispatch; combine goes by its current ``do_expand``.
            topk_weights: [N, K] float32 ([X] if expanded), gathered back per selection (0 where the selection is -1).
            bias: none, one or a pair of [T, H] bfloat16.
            num_sms: 0 is what the handle's dispatch was told, or else the analytic choice; num_qps: accepted.
            previous_event, previous_event_before_epilogue, async_with_compute_stream: as in dispatch.
            zero_copy: x (and topk_weights) lie in registered memory (registered_empty), contiguous, and peers read them
                there; rows of the plain layout only. The same on all ranks.

        Returns:
            ``(combined_x [T, H] bfloat16, combined_topk_weights [T, K] or None, event)``

        Raises:
            ValueError, TypeError: an argument; nothing was launched.
            EPTimeoutError, EPError: a peer did not come, or called something else; on GPUs a later call says so.
        """
        endpoint = self._usable()
        timing = Timing(
            previous_event, previous_event_before_epilogue, async_with_compute_stream, allocate_on_comm_stream
        )
        validate.is_count("num_qps", num_qps, 0)
        multiple = self.allow_multiple_reduction
        asked = AskedCombine(x, handle, topk_weights, bias, num_sms, zero_copy, timing, multiple)
        request = check_combine(endpoint, asked)
        with endpoint.owner.turn, endpoint.named("combine"):
            return run_combine(endpoint.usable(), request)

    def barrier(self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True) -> None:
        """What is queued after this waits until every rank has finished what it had queued before. Collective.

        Args:
            use_comm_stream: the ranks meet on the communication stream, and the current one waits for it; else on the
                current stream.
            with_cpu_sync: the host waits too. Without it the call may be captured in a CUDA graph. (On simulated ranks
                the host waits in any case.)
            sequential: whether the domains meet one after the other. In one domain it makes no difference.

        Raises:
            EPError: an earlier call of this rank has failed, a peer did not come or called something else; on GPUs only
                what is known by now, with ``with_cpu_sync`` everything.
        """
        endpoint = self._usable()
        validate.are_flags(use_comm_stream=use_comm_stream, with_cpu_sync=with_cpu_sync, sequential=sequential)
        with endpoint.owner.turn, endpoint.named("barrier"):
            endpoint.usable().barrier(use_comm_stream, with_cpu_sync)

    def destroy(self) -> None:
        """Give the memory back, after all ranks have finished with it. Collective; a second call does nothing.

        It waits for the other ranks' destroy(), for ``num_cpu_timeout_secs`` at most; for 5 s if the buffer is broken,
        or if an error is on its way here, since peers may wait for this rank elsewhere then.

        An earlier failure that nobody was told of yet is logged, not raised: it must not hide an error on its way. In a
        forked child it does nothing: the memory is the parent's.
        """
        endpoint = self._end()
        if not endpoint.owner.is_elsewhere:
            with endpoint.owner.turn:
                endpoint.destroy()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an ElasticBuffer cannot be copied or pickled: it is this process's end of what all ranks have built "
            "together; share the one, or build another on every rank. In a module that is copied or saved, keep it "
            "outside of what is (a global, or a __deepcopy__ or __getstate__ that leaves it out)"
        )

    def __copy__(self) -> NoReturn:
        self.__reduce__()

    def __deepcopy__(self, _: Any) -> NoReturn:
        self.__reduce__()

    def __del__(self) -> None:
        # No collective step here, and nothing that a CUDA graph being captured, on any thread, could trip over.
        endpoint = getattr(self, "_endpoint", None)
        if endpoint is None or endpoint.closed:
            return
        if endpoint.owner.is_elsewhere:
            dropped.ABANDONED.append(endpoint)
        elif self.explicitly_destroy:
            logger.warning("a buffer of rank %d was dropped without destroy(); its memory stays", self.rank_idx)
            endpoint.keep_for_good()
        else:
            endpoint.release()

    def _end(self) -> Endpoint:
        if self._endpoint is None:
            raise ValueError("this buffer was not built: its constructor raised")
        return self._endpoint

    def _usable(self) -> Endpoint:
        return self._end().usable()
