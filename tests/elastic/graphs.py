"""One rank of a job that captures calls in CUDA graphs and replays them thousands of times with inputs that change:

torchrun --nproc-per-node 2 -m tests.elastic.graphs --machine cuda

On simulated ranks, which have no graphs, the same calls are made anew each time, so that the job itself is tested.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deep_ep import ElasticBuffer, EPError, EPTimeoutError
from tests.elastic import cases, ways
from tests.elastic.replays import Recording, Results, Shape, Trip, Verdicts, processed, replay_in_turn
from tests.elastic.scenes import ODD, Job, play

LONG = 0.05  # seconds


def record(job: Job, buffer: ElasticBuffer, shape: Shape, seed: int, **how: Any) -> tuple[Trip, Recording]:
    trip = Trip(shape, buffer, job.device, seed)
    return trip, Recording(lambda: trip.calls(**how), job.device)


def replay(job: Job, *trips: tuple[Trip, Recording]) -> None:
    replay_in_turn(trips, job.replays)


def inputs_that_change(job: Job) -> None:
    """Nothing is called before the capture. One rank has no tokens where there are three; routes of all kinds."""
    buffer = job.build()
    replay(job, record(job, buffer, job.shape(num_biases=1), seed=1))
    buffer.destroy()


def many_tokens(job: Job) -> None:
    buffer = job.build()
    replay(job, record(job, buffer, job.wide(), seed=2))
    buffer.destroy()


def expanded_rows_of_fp8(job: Job) -> None:
    """With padding, two biases, and another dispatch by the handle in the other layout."""
    buffer = job.build()
    shape = job.shape(num_scales=5, alignment=8, expanded=True, num_biases=2, again=True)
    replay(job, record(job, buffer, shape, seed=3))
    buffer.destroy()


def known_routes(job: Job) -> None:
    """Both layouts by handles made before the capture; and the layout of rows that travel one by one."""
    buffer = job.build()
    plain = record(job, buffer, job.shape(cached=True), seed=4)
    expanded = record(job, buffer, job.shape(cached=True, expanded=True, alignment=4), seed=5)
    every_row = record(job, buffer, job.shape(cached=True, expanded=True, multiple_reduction=False), seed=6)
    replay(job, plain, expanded, every_row)
    buffer.destroy()


def rows_in_place(job: Job) -> None:
    """The same registered tensors in each replay: written again as soon as the calls that were given them have ended,
    while peers may still be in theirs. FP8 in both layouts, new and known routes."""
    buffer = job.build(num_registered_bytes=16 << 20)
    plain = record(job, buffer, job.wide(zero_copy=True, num_biases=1), seed=21)
    quantised = record(job, buffer, job.shape(zero_copy=True, num_scales=4, again=True), seed=22)
    expanded = record(job, buffer, job.shape(zero_copy=True, expanded=True, alignment=8), seed=23)
    known = record(job, buffer, job.shape(zero_copy=True, cached=True), seed=24)
    replay(job, plain, quantised, expanded, known)
    buffer.destroy()


def two_buffers_and_four_graphs(job: Job) -> None:
    """In an order that changes: epochs count on, whoever it is that counts."""
    first, second = job.build(), job.build()
    trips = [record(job, first, job.shape(), seed=7), record(job, first, job.shape(expanded=True, again=True), seed=8)]
    trips += [record(job, second, job.wide(), seed=9), record(job, second, job.shape(cached=True), seed=10)]
    replay(job, *trips)
    first.destroy()
    second.destroy()


def calls_in_between(job: Job) -> None:
    """Calls with and without CPU sync on the same stream; and replays on other streams that wait as they should."""
    buffer = job.build()
    trip, recording = record(job, buffer, job.shape(), seed=11)
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()] if job.on_gpus else []
    verdicts = Verdicts()
    for replay_idx in range(max(4, job.replays // 10)):
        if replay_idx % 4 == 1:
            cases.run(ways.draw(replay_idx, job.group), buffer, job.device)
        if streams:
            before, now = streams[replay_idx % 3], streams[(replay_idx + 1) % 3]
            now.wait_stream(before)
            torch.cuda.set_stream(now)
        trip.load()
        results = recording.replay()
        trip.compare(f"replay {replay_idx}", results, verdicts)
        rows = processed(results.payload[0], buffer.rank_idx + 1)
        again = buffer.combine(rows, results.handle)[0]
        verdicts.compare(f"combine by the handle of replay {replay_idx}", again, results.combined)
    if streams:
        streams[0].wait_stream(torch.cuda.current_stream())
        torch.cuda.set_stream(streams[0])
    verdicts.check()
    buffer.destroy()


def beside_the_compute_stream(job: Job) -> None:
    """Calls on the communication stream, captured with what produces their inputs, which takes its time."""
    for keep in ("0", "1"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EP_AVOID_RECORD_STREAM", keep)
            buffer = job.build()
        asynchronous = {"async_with_compute_stream": True}
        on_comm_stream = {**asynchronous, "allocate_on_comm_stream": True}
        ways_to_wait = ((asynchronous, False), (on_comm_stream, False), (asynchronous, True), (on_comm_stream, True))
        trips = []
        for i, (timing, by_event) in enumerate(ways_to_wait):
            shape = job.shape(num_biases=1, again=i == 2)
            how = {"produce": job.slowly, "by_event": by_event, **timing}
            trips.append(record(job, buffer, shape, seed=12 + i, **how))
        replay_in_turn(trips, max(len(trips), job.replays // 5))
        buffer.destroy()


def barriers(job: Job) -> None:
    """Captured, they hold everybody back until the slowest rank has come."""
    buffer = job.build()
    for on_comm_stream in (True, False):
        meet = lambda on_comm_stream=on_comm_stream: buffer.barrier(on_comm_stream)  # noqa: E731
        trip, recording = record(job, buffer, job.shape(), seed=15, between=meet)
        replay_in_turn([(trip, recording)], max(4, job.replays // 30))

        def late_or_not(trip: Trip = trip, meet: Callable[[], None] = meet) -> Results:
            if job.is_odd:
                job.delay(LONG)
            meet()
            return trip.calls()

        late = Recording(late_or_not, job.device)
        dist.barrier(job.group)
        seconds = job.seconds_of(late.replay)
        assert seconds > LONG / 2, f"a barrier was over after {seconds} s, before rank {ODD} had come"
    buffer.destroy()


def what_a_capture_refuses(job: Job) -> None:
    """Errors have names and leave the capture as it was; a buffer may be dropped in it."""
    buffer, dropped = job.build(), [job.build()]
    trip = Trip(job.shape(), buffer, job.device, seed=16)
    x, idx, num_experts = trip.given.payload[0], trip.given.topk_idx, trip.shape.num_experts

    def calls() -> Results:
        refused = (
            (EPError, "a deep_ep buffer cannot be built inside a CUDA graph capture", job.build),
            (EPError, "a deep_ep buffer cannot be destroyed inside a CUDA graph capture", buffer.destroy),
            (ValueError, "do_cpu_sync must be False", lambda: buffer.dispatch(x, idx, num_experts=num_experts)),
            (ValueError, "with_cpu_sync must be False", lambda: buffer.barrier(with_cpu_sync=True)),
        )
        for error, text, call in refused if job.on_gpus else ():
            with pytest.raises(error, match=text):
                call()
        dropped.clear()
        return trip.calls()

    replay_in_turn([(trip, Recording(calls, job.device))], 4)
    buffer.destroy()
    after = job.build()
    cases.run(ways.draw(17, job.group), after, job.device)
    after.destroy()


def the_validating_mode(job: Job) -> None:
    """It looks at selections where it can, and not inside of captures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EP_BUFFER_DEBUG", "1")
        buffer = job.build()
    replay_in_turn([record(job, buffer, job.shape(), seed=18)], 4)
    buffer.destroy()


def a_peer_that_does_not_replay(job: Job) -> None:
    """Replays end within the limit, and whoever asks the buffer is told; so is whoever replays once more."""
    for replays_before in (0, 3):
        buffer = job.build(num_gpu_timeout_secs=1, num_cpu_timeout_secs=20)
        trip, recording = record(job, buffer, job.shape(expanded=True), seed=19)
        replay_in_turn([(trip, recording)], replays_before)
        dist.barrier(job.group)
        if not job.is_odd:
            start_s = time.monotonic()
            with pytest.raises(EPTimeoutError, match=f" for rank {ODD} "):
                replay_alone(job, buffer, recording)
            assert time.monotonic() - start_s < 10
        dist.barrier(job.group)
        buffer.destroy()
    after = job.build()
    cases.run(ways.draw(20, job.group), after, job.device)
    after.destroy()


def replay_alone(job: Job, buffer: ElasticBuffer, recording: Recording) -> None:
    for _ in range(3):
        recording.replay()
    if job.on_gpus:
        torch.cuda.synchronize()
    buffer.get_comm_stream()  # asks what kernels have left


SCENES: tuple[Callable[[Job], None], ...] = (
    inputs_that_change,
    many_tokens,
    expanded_rows_of_fp8,
    known_routes,
    rows_in_place,
    two_buffers_and_four_graphs,
    calls_in_between,
    beside_the_compute_stream,
    barriers,
    what_a_capture_refuses,
    the_validating_mode,
    a_peer_that_does_not_replay,
)


if __name__ == "__main__":
    sys.exit(play(SCENES, __doc__))
