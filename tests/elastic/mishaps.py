"""One rank of a job in which everything goes wrong that can, and what comes after it goes well:

torchrun --nproc-per-node 3 -m tests.elastic.mishaps [--machine cuda]

A rank comes late, calls something else, runs out of memory, and last of all dies. Its peers are told within the limit,
in one report each, and can build anew: over the same group, or after a death over a new one.
"""

from __future__ import annotations

import argparse
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
from deep_ep.calls.dispatch import Outputs
from tests.elastic import cases, ranks, ways

LIMIT_SECONDS = 2.0
ODD = 1  # the rank that does otherwise


class Job:
    """This rank, and a buffer with short limits."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.buffer = self.build(group)

    def build(self, group: dist.ProcessGroup) -> ElasticBuffer:
        return ElasticBuffer(
            group,
            num_max_tokens_per_rank=ways.MOST,
            hidden=1024,
            num_gpu_timeout_secs=LIMIT_SECONDS,
            num_cpu_timeout_secs=20,
        )

    @property
    def is_odd(self) -> bool:
        return self.group.rank() == ODD

    def told(self, *calls: Callable[[], Any]) -> tuple[str, float]:
        """The error in which some calls end, and after how many seconds; GPUs report some a call later."""
        start = time.monotonic()
        try:
            for call in calls:
                call()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.buffer.get_comm_stream()  # asks what kernels have left
        except EPError as error:
            timed_out = isinstance(error, EPTimeoutError)
            text = str(error)
        else:
            return "", time.monotonic() - start
        assert timed_out == (" waited " in text), text
        return text, time.monotonic() - start

    def rebuild(self) -> None:
        """The buffer is of no use any more; another one is."""
        dist.barrier(self.group)
        self.buffer.destroy()
        self.buffer = self.build(self.group)
        cases.run(ways.draw(3, self.group), self.buffer, self.device)

    def dispatch(self, **changes: Any) -> Any:
        return ways.dispatch(self.buffer, self.device, **changes)


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
        text, _ = job.told(job.dispatch)  # what its peers had sent before they gave up may even be enough
        assert text == "" or "did not come to a launch" in text, text
    else:
        text, seconds = job.told(job.dispatch)
        assert f" for rank {ODD} " in text, text
        assert f"rank {job.group.rank()} waited {LIMIT_SECONDS} s in " in text, text
        assert seconds < 3 * LIMIT_SECONDS
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


def a_rank_with_another_call(job: Job) -> None:
    recv_x, _, _, handle, _ = job.dispatch()
    text, seconds = job.told(job.dispatch if not job.is_odd else lambda: job.buffer.combine(recv_x, handle))
    assert ("called dispatch" if job.is_odd else f"rank {ODD} called combine") in text, text
    assert seconds < LIMIT_SECONDS
    job.rebuild()


def a_rank_without_memory(job: Job) -> None:
    """It has sent what it had to, and cannot go on; its peers wait for it in the next call."""
    if job.is_odd:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Outputs, "allocate", out_of_memory)
            with pytest.raises(torch.OutOfMemoryError):
                job.dispatch()
    else:
        recv_x, _, _, handle, _ = job.dispatch()
        text, _ = job.told(lambda: job.buffer.combine(recv_x, handle))
        assert f" for rank {ODD} " in text, text
    job.rebuild()


def a_rank_that_dies(job: Job) -> None:
    """In the midst of a call. The others go on in a group of their own."""
    if job.is_odd:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Outputs, "allocate", lambda *_, **__: os._exit(0))
            job.dispatch()
    recv_x, _, _, handle, _ = job.dispatch()
    text, seconds = job.told(lambda: job.buffer.combine(recv_x, handle))
    assert f" for rank {ODD} " in text, text
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
    ranks_that_are_not_in_step,
    a_rank_that_comes_late,
    a_rank_with_other_sizes,
    a_rank_with_another_call,
    a_rank_without_memory,
    a_rank_that_dies,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machine", choices=ranks.MACHINES, default="simulated")
    logging.basicConfig(level=logging.WARNING, format="log: %(message)s")
    group, device = ranks.join(parser.parse_args().machine)
    job = Job(group, device)
    for mishap in MISHAPS:
        mishap(job)
        if group.rank() == 0:
            print(f"{mishap.__name__}: OK", flush=True)
    os._exit(0)  # a rank is dead: nothing of the group can be destroyed in good order


if __name__ == "__main__":
    sys.exit(main())
