"""One rank of a job in which everything goes wrong that can, and what comes after it goes well:

torchrun --nproc-per-node 3 -m tests.elastic.mishaps [--machine cuda]

A rank comes late, calls something else, runs out of memory, and last of all dies. Its peers are told within the limit,
in one report each, and can build anew: over the same group, or after a death over a new one. Nobody logs much.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deep_ep import ElasticBuffer, EPError, EPTimeoutError
from deep_ep.calls.expected import Expected
from deep_ep.calls.payload import Payload
from tests.elastic import cases, ranks, registered, ways

LIMIT_SECONDS = 2.0
REGISTERED_BYTES = 1 << 20
ODD = 1  # the rank that does otherwise
MOST_LINES = 8  # that a rank logs in one mishap, rebuilding included


class Job:
    """This rank, and a buffer with short limits."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.log = Log()
        self.buffer = self.build(group)

    def build(self, group: dist.ProcessGroup, **changes: Any) -> ElasticBuffer:
        usual = {
            "num_max_tokens_per_rank": ways.MOST,
            "hidden": 1024,
            "num_gpu_timeout_secs": LIMIT_SECONDS,
            "num_cpu_timeout_secs": 20,
            "num_registered_bytes": REGISTERED_BYTES,
        }
        return ElasticBuffer(group, **{**usual, **changes})

    @property
    def is_odd(self) -> bool:
        return self.group.rank() == ODD

    def told(self, *calls: Callable[[], Any]) -> tuple[str, float]:
        """The error in which some calls end, and after how many seconds. Simulated ranks are told by the call itself,
        GPUs by the next one, which may be any."""
        start = time.monotonic()
        try:
            for call in calls:
                call()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
                self.buffer.get_comm_stream()
        except EPError as error:
            text, seconds = str(error), time.monotonic() - start
            if isinstance(error, EPTimeoutError):
                report = error.report
                assert report is not None
                assert report.rank == self.group.rank()
                assert report.seconds >= 0.99 * LIMIT_SECONDS, report
                assert f" in {report.phase}" in text, text
                assert report.counters.keys() == {"expected_epoch", "seen_epoch"}, report
                assert all(f"rank {peer}" in text for peer in report.peers), text
            else:
                assert " waited " not in text, text
        else:
            return "", time.monotonic() - start
        with pytest.raises(EPError, match="this buffer must be rebuilt on every rank"):
            self.dispatch()
        return text, seconds

    def rebuild(self) -> None:
        """The buffer is of no use any more; another one is."""
        dist.barrier(self.group)
        self.buffer.destroy()
        self.buffer = self.build(self.group)
        cases.run(ways.draw(3, self.group), self.buffer, self.device)

    def dispatch(self, **changes: Any) -> Any:
        return ways.dispatch(self.buffer, self.device, **changes)

    def dispatch_in_place(self, **changes: Any) -> Any:
        return self.dispatch(x=self.in_place(ways.tokens(self.buffer, self.device)), zero_copy=True, **changes)

    def in_place(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same in registered memory."""
        home = registered.like(self.buffer, tensor)
        home.write(tensor)
        return home.tensor


class Log(logging.Handler):
    """What the library has logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logging.getLogger("deep_ep").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def ranks_that_need_not_agree(job: Job) -> None:
    """Whether the host waits, SMs, alignment and layout are each rank's own business."""
    expected = job.dispatch()
    combined = job.buffer.combine(expected[0], expected[3])[0]
    for waits in (job.is_odd, not job.is_odd):
        own = {"num_sms": 1 + job.group.rank(), "expert_alignment": 8 if job.is_odd else 1}
        recv_x, _, _, handle, _ = job.dispatch(do_cpu_sync=waits, **own)
        ways.same(recv_x[: len(expected[0])], expected[0])
        job.buffer.dispatch(ways.tokens(job.buffer, job.device), handle=handle, do_expand=job.is_odd)
        handle.do_expand = False
        ways.same(job.buffer.combine(recv_x, handle)[0], combined)


def ranks_that_build_differently(job: Job) -> None:
    for name, odd, usual in (
        ("num_max_tokens_per_rank", ways.MOST - 1, ways.MOST),
        ("num_bytes", 16 << 20, 8 << 20),
        ("allow_multiple_reduction", False, True),
        ("num_registered_bytes", 0, REGISTERED_BYTES),
    ):
        changes = {"num_bytes": 8 << 20, name: odd if job.is_odd else usual}
        with pytest.raises(ValueError, match=f"^{name} must be .* is {usual} on rank 0 and {odd} on rank {ODD} of the"):
            job.build(job.group, **changes)


def a_rank_that_comes_a_little_late(job: Job) -> None:
    """Its peers say so, and wait on."""
    if job.is_odd:
        time.sleep(LIMIT_SECONDS / 2)
    recv_x, _, _, handle, _ = job.dispatch()
    job.buffer.combine(recv_x, handle)
    dist.barrier(job.group)
    start = time.monotonic()
    if job.is_odd:
        time.sleep(LIMIT_SECONDS / 4)
    job.buffer.barrier(with_cpu_sync=True)
    assert time.monotonic() - start > 0.9 * LIMIT_SECONDS / 4, "nobody leaves a barrier before all have come"
    if job.group.rank() == 0:  # who hosts simulated ranks speaks for all of them
        assert [line for line in job.log.lines if f"for rank {ODD} " in line], job.log.lines


def ranks_that_are_not_in_step(job: Job) -> None:
    """Each comes when it likes, within the limits: nobody minds, and notices are all there is."""
    chance = random.Random(job.group.rank())
    for seed in range(4):
        time.sleep(chance.choice([0.0, 0.05, 0.3 * LIMIT_SECONDS]))
        cases.run(ways.draw(seed, job.group), job.buffer, job.device)


def a_rank_that_comes_late(job: Job) -> None:
    """Much later than its peers wait."""
    if job.is_odd:
        time.sleep(3 * LIMIT_SECONDS)
        text, seconds = job.told(job.dispatch)  # what its peers had sent before they gave up may even be enough
        told = (f"has gone on without rank {ODD} (did not come)", " waited ")  # simulated ranks at once, GPUs in vain
        assert text == "" or any(words in text for words in told), text
        assert seconds < 2 * LIMIT_SECONDS
    else:
        text, seconds = job.told(job.dispatch)
        assert f" for rank {ODD} " in text, text
        assert f"rank {job.group.rank()} waited {LIMIT_SECONDS} s in " in text, text
        assert seconds < 3 * LIMIT_SECONDS
    job.rebuild()


def a_host_that_waits_less_than_its_kernels(job: Job) -> None:
    """It says whose counts are missing. On simulated ranks kernels have ended before a host looks."""
    if job.device.type != "cuda":
        return
    job.buffer.destroy()
    job.buffer = job.build(job.group, num_cpu_timeout_secs=LIMIT_SECONDS, num_gpu_timeout_secs=1.5 * LIMIT_SECONDS)
    if not job.is_odd:
        start = time.monotonic()
        with pytest.raises(EPTimeoutError) as caught:
            job.dispatch()
        assert time.monotonic() - start < 1.4 * LIMIT_SECONDS
        report = caught.value.report
        assert report is not None
        assert report.phase == "for the counts of a dispatch"
        assert report.peers == (ODD,), report
        assert f"its kernels waited for rank {ODD};" in str(caught.value)
    job.rebuild()


def a_rank_with_other_sizes(job: Job) -> None:
    changes = {"num_max_tokens_per_rank": ways.MOST - 2} if job.is_odd else {}
    for do_cpu_sync in (True, False):
        text, seconds = job.told(lambda do_cpu_sync=do_cpu_sync: job.dispatch(do_cpu_sync=do_cpu_sync, **changes))
        peer = 0 if job.is_odd else ODD
        mine, theirs = (ways.MOST - 2, ways.MOST) if job.is_odd else (ways.MOST, ways.MOST - 2)
        assert f"made this call with num_max_tokens_per_rank {theirs}, rank {job.group.rank()} with {mine}." in text, (
            text
        )
        assert job.is_odd or text.startswith(f"rank {peer} "), text
        assert seconds < LIMIT_SECONDS
        job.rebuild()


def a_rank_that_sends_its_rows(job: Job) -> None:
    """Its peers would read them in place; or it has registered them, and waits for counts where its peers do not."""
    for odd, usual, theirs in (
        (job.dispatch, job.dispatch_in_place, "rank 1 called dispatch (num_topk 2, topk_weights), rank"),
        (job.dispatch_in_place, job.dispatch, "rank 1 called dispatch (num_topk 2, topk_weights, zero_copy"),
        (job.dispatch_in_place, functools.partial(job.dispatch_in_place, do_cpu_sync=False), "zero_copy, do_cpu_sync)"),
    ):
        text, seconds = job.told(odd if job.is_odd else usual)
        assert "zero_copy" in text, text
        assert job.is_odd or theirs in text, text
        assert seconds < LIMIT_SECONDS
        job.rebuild()
    recv_x, _, _, handle, _ = job.dispatch_in_place()
    text, seconds = job.told(lambda: job.buffer.combine(job.in_place(recv_x), handle, zero_copy=not job.is_odd))
    assert "combine (num_topk 2, zero_copy)" in text, text
    assert seconds < LIMIT_SECONDS
    job.rebuild()


def a_rank_that_reads_no_rows(job: Job) -> None:
    """It comes late, and its peers' calls do not end before; it does not come, and they are told."""
    recv_x, _, _, handle, _ = job.dispatch_in_place()
    dist.barrier(job.group)
    start = time.monotonic()
    if job.is_odd:
        time.sleep(LIMIT_SECONDS / 4)
    job.buffer.combine(job.in_place(recv_x), handle, zero_copy=True)
    if job.device.type == "cuda":
        torch.cuda.synchronize(job.device)
    assert time.monotonic() - start > 0.9 * LIMIT_SECONDS / 4, (
        "peers may still read what a call was given that has ended"
    )
    if not job.is_odd:
        text, _ = job.told(lambda: job.dispatch_in_place(do_cpu_sync=False))
        assert f" rank {ODD} " in text, text
    job.rebuild()


def a_rank_with_another_call(job: Job) -> None:
    recv_x, _, _, handle, _ = job.dispatch()
    text, seconds = job.told(job.dispatch if not job.is_odd else lambda: job.buffer.combine(recv_x, handle))
    assert ("called dispatch" if job.is_odd else f"rank {ODD} called combine") in text, text
    assert seconds < LIMIT_SECONDS
    job.rebuild()


def a_rank_in_a_barrier(job: Job) -> None:
    text, seconds = job.told(lambda: job.buffer.barrier(with_cpu_sync=True) if job.is_odd else job.dispatch())
    assert ("called dispatch" if job.is_odd else f"rank {ODD} called barrier, rank") in text, text
    assert seconds < LIMIT_SECONDS
    job.rebuild()


def a_barrier_without_one_rank(job: Job) -> None:
    if not job.is_odd:
        text, _ = job.told(lambda: job.buffer.barrier(with_cpu_sync=True))
        assert f" rank {ODD} " in text, text
    job.rebuild()


def a_rank_with_another_handle(job: Job) -> None:
    x = ways.tokens(job.buffer, job.device)
    for call in ("combine", "dispatch"):
        results = [job.dispatch(), job.dispatch()]
        recv_x, _, _, handle, _ = results[0 if job.is_odd else 1]
        combines = functools.partial(job.buffer.combine, recv_x, handle)
        dispatches = functools.partial(job.buffer.dispatch, x, handle=handle)
        text, seconds = job.told(combines if call == "combine" else dispatches)
        assert "used the handle of call " in text, text
        assert job.is_odd or text.startswith(f"rank {ODD} "), text
        assert seconds < LIMIT_SECONDS
        job.rebuild()


def blames_it(text: str) -> bool:
    """Whoever misses its deadline first is named: the odd rank, or one that waits for it, which the text says."""
    return f" rank {ODD} " in text or "waits itself for a third rank" in text


def a_rank_without_memory(job: Job) -> None:
    """It has sent what it had to, and cannot go on; its peers wait for it in the next call, or for each other."""
    if job.is_odd:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Payload, "new_empty", out_of_memory)
            with pytest.raises(torch.OutOfMemoryError):
                job.dispatch()
    else:
        recv_x, _, _, handle, _ = job.dispatch()
        text, _ = job.told(lambda: job.buffer.combine(recv_x, handle))
        assert blames_it(text), text
    job.rebuild()


def a_rank_that_dies(job: Job) -> None:
    """In the midst of a call. The others go on in a group of their own."""
    if job.is_odd:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Expected, "note", lambda *_: os._exit(0))  # when it knows the counts
            job.dispatch()
    recv_x, _, _, handle, _ = job.dispatch()
    text, seconds = job.told(lambda: job.buffer.combine(recv_x, handle))
    assert blames_it(text), text
    assert seconds < 3 * LIMIT_SECONDS
    start = time.monotonic()
    job.buffer.destroy()
    assert time.monotonic() - start < 8
    survivors = dist.new_group([0, *range(2, job.group.size())], use_local_synchronization=True)
    assert survivors is not None
    job.buffer = job.build(survivors)
    cases.run(ways.draw(4, survivors), job.buffer, job.device)
    job.buffer.destroy()


def out_of_memory(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("no memory")


MISHAPS: tuple[Callable[[Job], None], ...] = (
    ranks_that_need_not_agree,
    ranks_that_build_differently,
    a_rank_that_comes_a_little_late,
    ranks_that_are_not_in_step,
    a_rank_that_comes_late,
    a_host_that_waits_less_than_its_kernels,
    a_rank_with_other_sizes,
    a_rank_that_sends_its_rows,
    a_rank_that_reads_no_rows,
    a_rank_with_another_call,
    a_rank_in_a_barrier,
    a_barrier_without_one_rank,
    a_rank_with_another_handle,
    a_rank_without_memory,
    a_rank_that_dies,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machine", choices=ranks.MACHINES, default="simulated")
    logging.basicConfig(level=logging.WARNING, format="log: %(message)s")
    group, device = ranks.join(parser.parse_args().machine, splits=False)
    job = Job(group, device)
    for mishap in MISHAPS:
        job.log.lines.clear()
        mishap(job)
        assert len(job.log.lines) <= MOST_LINES, job.log.lines
        if group.rank() == 0:
            print(f"{mishap.__name__}: OK", flush=True)
    os._exit(0)  # a rank is dead: nothing of the group can be destroyed in good order


if __name__ == "__main__":
    sys.exit(main())
