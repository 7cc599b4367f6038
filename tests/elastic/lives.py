"""One rank of a job whose simulated buffers come and go, not on all ranks at once:

torchrun --nproc-per-node 2 -m tests.elastic.lives
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from deep_ep import ElasticBuffer, EPError, EPTimeoutError
from tests.elastic import cases, ranks, ways

TOKENS, HIDDEN, EXPERTS = 256, 1024, 4
HOST = 0  # the rank that hosts all of them
LIMIT_SECONDS = 4.0


def build(group: dist.ProcessGroup) -> ElasticBuffer:
    timeouts = {"num_gpu_timeout_secs": LIMIT_SECONDS, "num_cpu_timeout_secs": 3}
    return ElasticBuffer(group, num_max_tokens_per_rank=TOKENS, hidden=HIDDEN, **timeouts)


def dropped_as_soon_as_a_call_returns(group: dist.ProcessGroup) -> None:
    """Which the others' may not have done yet. Tokens are many enough for that."""
    x = torch.ones(TOKENS, HIDDEN, dtype=torch.bfloat16)
    topk_idx = torch.arange(2 * TOKENS).reshape(TOKENS, 2) % EXPERTS  # each rank's tokens to two ranks, in turn
    for _ in range(10):
        buffer = build(group)
        recv_x, *_ = buffer.dispatch(x, topk_idx, num_experts=EXPERTS)
        del buffer
        gc.collect()
        assert len(recv_x) == TOKENS
        dist.barrier(group)


def the_host_goes(group: dist.ProcessGroup, leave: Callable[[ElasticBuffer], None]) -> None:
    """While its peers are in a call that it does not make; they are told that it has gone, not that they waited."""
    buffer = build(group)
    dist.barrier(group)
    if group.rank() == HOST:
        time.sleep(0.5)
        leave(buffer)
    else:
        with pytest.raises(EPTimeoutError, match=r"Rank 0 has destroyed or dropped its buffer, or died"):
            buffer.barrier()
        with pytest.raises(EPError, match="must be rebuilt on every rank"):
            buffer.barrier()
    del buffer
    dist.barrier(group)


def the_host_drops_it(group: dist.ProcessGroup) -> None:
    the_host_goes(group, lambda _: None)


def the_host_destroys_it(group: dist.ProcessGroup) -> None:
    the_host_goes(group, ElasticBuffer.destroy)


def the_host_is_interrupted(group: dist.ProcessGroup) -> None:
    def leave(buffer: ElasticBuffer) -> None:
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            time.sleep(60)
        buffer.destroy()

    the_host_goes(group, leave)


def a_child_drops_it(group: dist.ProcessGroup) -> None:
    """A forked one, like a data loader's worker: the buffer stays the parent's."""
    buffer = build(group)
    child = os.fork()
    if child == 0:
        del buffer
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    dist.barrier(group)
    buffer.barrier()
    buffer.destroy()


def threads_share_it(group: dist.ProcessGroup) -> None:
    """One of them calls at a time."""
    buffer, problems = build(group), list[BaseException]()

    def run() -> None:
        try:
            for _ in range(20):
                buffer.barrier()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems
    buffer.destroy()


LIVES: tuple[Callable[[dist.ProcessGroup], None], ...] = (
    dropped_as_soon_as_a_call_returns,
    the_host_drops_it,
    the_host_destroys_it,
    the_host_is_interrupted,
    a_child_drops_it,
    threads_share_it,
)


def main() -> int:
    group, device = ranks.join("simulated")
    for life in LIVES:
        life(group)
        if group.rank() == HOST:
            print(f"{life.__name__}: OK", flush=True)
    buffer = ways.build(group)
    cases.run(ways.draw(1, group), buffer, device)
    dist.barrier(group)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
