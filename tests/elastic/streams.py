"""One rank of a job about what waits for what, and what does not: streams, events, memory, threads, Ctrl-C.

torchrun --nproc-per-node 2 -m tests.elastic.streams [--machine cuda]
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deep_ep import ElasticBuffer, EPError, EventOverlap
from deep_ep.calls.expected import FEW_MORE_ROWS
from deep_ep.utils import per_token_cast_to_fp8
from tests.elastic import cases, ways
from tests.elastic.replays import Trip, Verdicts, plain
from tests.elastic.scenes import SOON, Job, play

LONG, LONGER = 0.05, 0.3  # seconds
ASYNC = {"async_with_compute_stream": True}
TIMINGS: tuple[dict[str, Any], ...] = (
    {},
    ASYNC,
    {"allocate_on_comm_stream": True},
    {**ASYNC, "allocate_on_comm_stream": True},
)


def build_keeping(job: Job, in_event: bool) -> ElasticBuffer:
    """A buffer whose asynchronous calls keep their tensors alive in the event, or by record_stream."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EP_AVOID_RECORD_STREAM", str(int(in_event)))
        return job.build()


def two_buffers_on_two_streams(job: Job) -> None:
    """At once, and ranks differ in which of the two comes first."""
    buffers, streams, verdicts = [job.build(), job.build()], job.streams(2), Verdicts()
    trips = [Trip(job.wide(), buffers[0], job.device, seed=1)]
    trips += [Trip(job.shape(expanded=True, alignment=4), buffers[1], job.device, seed=2)]
    for timing in TIMINGS:
        for round_idx in range(max(2, job.replays // 100)):
            for which, (trip, stream) in enumerate(zip(trips, streams, strict=True)):
                with job.on(stream):
                    if (round_idx + job.group.rank() + which) % 2:
                        job.delay(SOON)
                    trip.load()
                    trip.compare(f"round {round_idx} of buffer {which}", trip.calls(**timing), verdicts)
    wait_for_all(job)
    verdicts.check()
    for seed in range(4):  # with exact sizes, for which the host waits
        under_way = []
        for which, (buffer, stream) in enumerate(zip(buffers, streams, strict=True)):
            with job.on(stream):
                under_way.append(cases.Trip(ways.draw(10 * which + seed, job.group), buffer, job.device))
        wait_for_all(job)
        for trip in under_way:
            trip.check()
    for buffer in buffers:
        buffer.destroy()


def two_buffers_that_share_counters(job: Job) -> None:
    """Calls that overlap add to the same statistics, and nothing is lost."""
    buffers, streams, shape = [job.build(), job.build()], job.streams(2), job.shape()
    given = Trip(shape, buffers[0], job.device, seed=7).given
    experts = shape.num_experts // job.group.size()
    stats, once = (torch.zeros(experts, dtype=torch.int32, device=job.device) for _ in range(2))
    arguments = {"num_experts": shape.num_experts, "do_cpu_sync": False}
    routes = plain(given.payload), given.topk_idx
    buffers[0].dispatch(*routes, cumulative_local_expert_recv_stats=once, **arguments)
    wait_for_all(job)
    for _ in range(job.replays):
        for buffer, stream in zip(buffers, streams, strict=True):
            with job.on(stream):
                buffer.dispatch(*routes, cumulative_local_expert_recv_stats=stats, **arguments)
    wait_for_all(job)
    ways.same(stats, once * 2 * job.replays)
    for buffer in buffers:
        buffer.destroy()


def wait_for_all(job: Job) -> None:
    if job.on_gpus:
        torch.cuda.synchronize(job.device)


def two_threads(job: Job) -> None:
    """Each with a buffer and a stream of its own; neither knows of the other."""
    buffers, streams = [job.build(), job.build()], job.streams(2)

    def work(which: int) -> None:
        if job.on_gpus:
            torch.cuda.set_device(job.device)
        with job.on(streams[which]):
            for seed in range(6):
                cases.run(ways.draw(100 * which + seed, job.group), buffers[which], job.device)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    for buffer in buffers:
        buffer.destroy()


def slow_producers(job: Job) -> None:
    """What a call takes is not there yet when it is called; nor are the rows when combine is."""
    for in_event in (False, True):
        buffer, verdicts = build_keeping(job, in_event), Verdicts()
        for timing in TIMINGS:
            for by_event in (False, True):
                trip = Trip(job.shape(num_biases=1), buffer, job.device, seed=3)
                for round_idx in range(2):
                    trip.load()
                    results = trip.calls(job.slowly, lambda: job.delay(SOON), by_event, **timing)
                    trip.compare(f"round {round_idx}, {timing}, by event {by_event}", results, verdicts)
        verdicts.check()
        expected = ways.dispatch(buffer, job.device)[0]
        for timing in TIMINGS:  # with exact sizes, for which the host waits
            x = ways.tokens(buffer, job.device)
            late = torch.zeros_like(x)
            job.delay(SOON)
            late.copy_(x)
            recv_x, *_, event = ways.dispatch(buffer, job.device, x=late, **timing)
            event.current_stream_wait()
            ways.same(recv_x, expected)
        buffer.destroy()


def what_a_call_waits_for(job: Job) -> None:
    """Seen by asking events while something long is queued; on simulated ranks nothing is ever queued."""
    buffer = job.build()
    given = Trip(job.shape(), buffer, job.device, seed=4).given
    arguments = {"num_experts": job.shape().num_experts, **ASYNC}

    def dispatch(**timing: Any) -> Any:
        return buffer.dispatch(given.payload[0], given.topk_idx, **arguments, **timing)

    for do_cpu_sync in (False, True) if job.on_gpus else ():
        dist.barrier(job.group)
        torch.cuda.synchronize()
        gate = job.later(LONGER)
        recv_x, _, _, handle, event = dispatch(previous_event_before_epilogue=gate, do_cpu_sync=do_cpu_sync)
        assert_done(buffer.capture(), "the current stream was made to wait for an asynchronous call")
        assert not happened(event), "the call did not wait for the event before its epilogue"
        assert_done(event, "")
        assert happened(gate)

        gate = job.later(LONG)
        event = buffer.combine(recv_x, handle, previous_event_before_epilogue=gate, **ASYNC)[2]
        assert_done(event, "")
        assert happened(gate), "combine did not wait for the event before its epilogue"

        # The last call was one on the current stream: what is queued there afterwards is not its part.
        buffer.dispatch(given.payload[0], given.topk_idx, num_experts=job.shape().num_experts, do_cpu_sync=do_cpu_sync)
        dist.barrier(job.group)
        torch.cuda.synchronize()
        before = buffer.capture()
        job.delay(LONGER)
        behind = buffer.capture()
        recv_x, _, _, handle, event = dispatch(previous_event=before, do_cpu_sync=do_cpu_sync)
        assert_done(event, "")
        event = buffer.combine(recv_x, handle, previous_event=event, **ASYNC)[2]
        assert_done(event, "")
        assert not happened(behind), "the calls waited for the current stream, and not for the events instead"
        torch.cuda.synchronize()

    for wait in (EventOverlap.current_stream_wait, EventOverlap.__call__, leave):
        *_, event = dispatch(previous_event_before_epilogue=job.later(LONG), do_cpu_sync=False)
        hooks: list[str] = []
        event.register_hook_after_wait(lambda hooks=hooks: hooks.append("called"))
        wait(event)
        assert hooks == ["called"]
        after = buffer.capture()
        assert_done(after, "")
        assert happened(event), "the current stream was to wait for the call"
    buffer.destroy()


def selections_that_come_late(job: Job) -> None:
    """The validating mode looks at them when the event says that they are there, not at what lies there before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EP_BUFFER_DEBUG", "1")
        buffer = job.build()
    given = Trip(job.shape(), buffer, job.device, seed=6).given
    num_experts = job.shape().num_experts
    late = torch.full_like(given.topk_idx, num_experts)  # wrong
    (stream,) = job.streams(1)
    with job.on(stream):
        job.delay(LONG)
        late.copy_(given.topk_idx)
        there = buffer.capture()
    results = buffer.dispatch(plain(given.payload), late, num_experts=num_experts, previous_event=there)
    ways.same(results[0], buffer.dispatch(plain(given.payload), given.topk_idx, num_experts=num_experts)[0])
    buffer.destroy()


def leave(event: EventOverlap) -> None:
    with event as entered:
        assert entered is event


def cuda_event(event: Any) -> Any:
    """Of an EventOverlap or an EventHandle; None on simulated ranks."""
    return cuda_event(event.event) if isinstance(event, EventOverlap) else event.event


def happened(event: Any) -> bool:
    return cuda_event(event) is None or bool(cuda_event(event).query())


def assert_done(event: Any, complaint: str) -> None:
    """Wait for an event; it must not take as long as what is delayed."""
    start_s = time.monotonic()
    if cuda_event(event) is not None:
        cuda_event(event).synchronize()
    assert not complaint or time.monotonic() - start_s < LONGER / 2, complaint


def memory_that_is_given_back(job: Job) -> None:
    """Tensors that nobody holds any more are not handed to others while kernels still read them, or write to them."""
    for in_event in (False, True):
        buffer, verdicts = build_keeping(job, in_event), Verdicts()
        trip = Trip(job.wide(), buffer, job.device, seed=5)
        routes = {"num_experts": trip.shape.num_experts, "num_max_tokens_per_rank": trip.shape.max_tokens}
        for round_idx in range(4):
            trip.load()
            given = trip.given.copied()
            timing = {**ASYNC, "previous_event_before_epilogue": job.later(4 * SOON), "do_cpu_sync": False}
            # Arguments that are temporaries: once the call has returned, nobody else knows them.
            recv_x, _, recv_weights, _, event = buffer.dispatch(
                plain(given.payload).clone(), given.topk_idx.clone(), given.weights.clone(), **routes, **timing
            )
            claimed = [torch.full_like(each, 77) for each in given.tensors for _ in range(3)]
            event.current_stream_wait()
            rows = trip.due.rows[False]
            assert recv_weights is not None
            verdicts.compare(f"round {round_idx}: recv_x", recv_x[rows.where], rows.payload[0])
            verdicts.compare(f"round {round_idx}: weights", recv_weights[rows.where], rows.weights)
            # Results that nobody wants: their memory is not somebody else's before the kernels are done.
            timing["previous_event_before_epilogue"] = job.later(4 * SOON)
            event = buffer.dispatch(plain(given.payload), given.topk_idx, **routes, **timing)[4]
            claimed = [torch.full_like(recv_x, 77) for _ in range(6)]
            event.current_stream_wait()
            for each in claimed:
                verdicts.compare(f"round {round_idx}: somebody else's memory", each, torch.full_like(each, 77))
        verdicts.check()
        buffer.destroy()


@contextmanager
def counting() -> Iterator[list[int]]:
    """A thread that counts what it comes to do meanwhile: [count]."""
    count, over = [0], threading.Event()

    def work() -> None:
        while not over.is_set():
            count[0] += 1
            time.sleep(SOON)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield count
    finally:
        over.set()
        thread.join()


def waits_of(job: Job) -> tuple[Callable[[ElasticBuffer], Any], ...]:
    """Calls in which the host waits for its peers."""
    return lambda buffer: ways.dispatch(buffer, job.device), lambda buffer: buffer.barrier(with_cpu_sync=True)


def sizes_that_are_expected(job: Job) -> None:
    """The second dispatch that brings as much as the first has room before it is launched; nothing else changes, but
    for the memory behind what it returns, which is hardly more."""
    buffer = job.build()
    x8 = per_token_cast_to_fp8(ways.tokens(buffer, job.device))
    for alignment, arguments in enumerate(
        (
            {},
            {"do_expand": True, "do_zero_padding": True},
            {"x": x8},
            {"x": x8, "do_expand": True, "do_zero_padding": True, "async_with_compute_stream": True},
            {"async_with_compute_stream": True, "allocate_on_comm_stream": True},
        ),
        start=4,  # shapes of their own: nothing is expected at first
    ):
        results = []
        for _ in range(3):
            received, idx, weights, handle, event = ways.dispatch(
                buffer, job.device, expert_alignment=alignment, **arguments
            )
            event.current_stream_wait()
            rows = received if isinstance(received, tuple) else (received,)
            counts = (handle.num_recv_tokens, handle.num_expanded_tokens, handle.num_recv_tokens_per_expert_list)
            results.append(([*rows, idx, weights, handle.recv_src_metadata], counts))
            with_room = rows[0].untyped_storage().nbytes() // (rows[0].shape[1] * rows[0].element_size())
            assert with_room == len(rows[0]) + (FEW_MORE_ROWS if len(results) > 1 else 0)
        for tensors, counts in results[1:]:
            assert counts == results[0][1]
            for got, expected in zip(tensors, results[0][0], strict=True):
                if expected is not None:
                    ways.same(got, expected)
                    assert got.is_contiguous()
    buffer.destroy()


def other_threads_while_the_host_waits(job: Job) -> None:
    """They go on: whoever waits for a late rank does not hold the interpreter."""
    buffer = job.build()
    for call in waits_of(job):
        dist.barrier(job.group)
        if job.is_odd:
            time.sleep(LONGER)
        with counting() as count:
            call(buffer)
        assert job.is_odd or count[0] > 20, f"a thread came to count to {count[0]} only, while the host waited"
    buffer.destroy()


def ctrl_c_while_the_host_waits(job: Job) -> None:
    """It gets through within moments, while a buffer is built as well as in its calls; then all build anew."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the shell said
    if not job.is_odd:
        interrupt(job.build)
    for call in waits_of(job):
        dist.barrier(job.group)
        buffer = job.build(num_gpu_timeout_secs=2, num_cpu_timeout_secs=20)
        if not job.is_odd:
            interrupt(lambda call=call, buffer=buffer: call(buffer))
            with pytest.raises(EPError, match="this buffer must be rebuilt on every rank"):
                buffer.get_comm_stream()
        dist.barrier(job.group)
        buffer.destroy()
    signal.signal(signal.SIGINT, before)
    after = job.build()
    cases.run(ways.draw(6, job.group), after, job.device)
    after.destroy()


def interrupt(call: Callable[[], Any]) -> None:
    """Make a call in which Ctrl-C comes."""
    timer = threading.Timer(LONGER, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    start_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        call()
    assert time.monotonic() - start_s < LONGER + 1
    timer.join()


SCENES: tuple[Callable[[Job], None], ...] = (
    two_buffers_on_two_streams,
    two_buffers_that_share_counters,
    two_threads,
    slow_producers,
    what_a_call_waits_for,
    selections_that_come_late,
    memory_that_is_given_back,
    sizes_that_are_expected,
    other_threads_while_the_host_waits,
    ctrl_c_while_the_host_waits,
)

if __name__ == "__main__":
    sys.exit(play(SCENES, __doc__))
