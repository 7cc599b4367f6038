"""Time dispatch and combine end to end:  torchrun --nproc-per-node 2 -m benchmarks.ep [--sms 8,16,24] [--repeat 200]

Each timed call starts with both ranks aligned on the GPU (a small all-reduce), L2 flushed, and the host far ahead, so
that what is measured is what the streams see: inputs ready to outputs ready. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.timing import Stopwatch, Workload

COPY_BYTES = 48 << 20  # what the ceilings copy; a window has room for it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    Workload.add_arguments(parser)
    parser.add_argument("--sms", default="16,24,32,48")
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--repeat", type=int, default=0, help="only check that so many runs are bit-identical")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    workload = Workload.make(arguments)
    if arguments.repeat:
        check_repeat(arguments.repeat, workload)
    else:
        measure(arguments, workload)
    workload.close()


def check_repeat(times: int, workload: Workload) -> None:
    """Results of many runs, at changing SM counts, must not differ by a bit."""
    reference: list[torch.Tensor] = []
    for i in range(times):
        recv_x, recv_idx, recv_weights, handle, _ = workload.dispatch([24, 8, 16, 48][i % 4], sync=i % 2 == 0)
        rows = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
        combined, combined_weights, _ = workload.buffer.combine(recv_x, handle, topk_weights=recv_weights)
        results = [recv_x[:rows], recv_idx[:rows], recv_weights[:rows], handle.recv_src_metadata[:rows], combined]
        assert torch.equal(combined_weights, workload.weights), f"run {i}: weights did not come back"
        if not reference:
            reference = [result.clone() for result in results]
        for name, was, now in zip(["x", "idx", "weights", "metadata", "combined"], reference, results, strict=True):
            same = torch.equal(was.view(torch.uint8), now.view(torch.uint8))
            assert same, f"run {i}: {name} differs from the first run"
    if dist.get_rank() == 0:
        print(f"{times} runs bit-identical: OK")


class Table:
    """Results of all ranks, printed by rank 0 as they come."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, sms: int, times: list[float], link_bytes: float) -> None:
        """Collective: one line of medians (quartiles) and rates, a column a rank."""
        median, (low, _, high) = statistics.median(times), statistics.quantiles(times, n=4)
        mine = {"rank": dist.get_rank(), "name": name, "sms": sms, "us": median, "low": low, "high": high}
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, {**mine, "gbs": link_bytes / median / 1e3})
        self.rows.extend(everyone)
        columns = (f"{r['us']:7.1f} us ({r['low']:.1f}-{r['high']:.1f}) {r['gbs']:5.1f} GB/s" for r in everyone)
        say(f"{name:<28} {sms:>4} " + "   ".join(columns))


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def measure(arguments: argparse.Namespace, workload: Workload) -> None:
    x, buffer = workload.x, workload.buffer
    stopwatch, table = Stopwatch(x.device), Table()
    row_bytes = x.shape[1] * x.element_size()
    handle = workload.dispatch(24)[3]
    sums = [0, *handle.psum_num_recv_tokens_per_scaleup_rank.tolist()]
    received = [b - a for a, b in itertools.pairwise(sums)]
    remote_bytes = float(sum(n for source, n in enumerate(received) if source != dist.get_rank()) * row_bytes)
    say(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.tokens} x {arguments.hidden} bf16, "
        f"top-{arguments.topk} of {arguments.experts}; columns: ranks"
    )

    def record(name: str, sms: int, call: Any, num_bytes: float) -> None:
        table.add(name, sms, stopwatch.times(call, arguments.iterations), num_bytes)

    record("ceiling: copy engine to peer", 0, lambda: copy_to_peer(buffer, COPY_BYTES), COPY_BYTES)
    record("ceiling: local copy of x", 0, x.clone, row_bytes * x.shape[0])
    for sms in map(int, arguments.sms.split(",")):
        record("dispatch bf16", sms, functools.partial(workload.dispatch, sms), remote_bytes)
        recv_x, _, recv_weights, handle, _ = workload.dispatch(sms)
        combine = functools.partial(buffer.combine, recv_x, handle, topk_weights=recv_weights)
        record("combine bf16", sms, combine, remote_bytes)
        record("dispatch bf16, CPU sync", sms, functools.partial(workload.dispatch, sms, sync=True), remote_bytes)
    started = time.perf_counter()
    for _ in range(100):
        workload.dispatch(24)
    host_us = (time.perf_counter() - started) * 1e4
    torch.cuda.synchronize()
    say(f"host, dispatch without CPU sync: {host_us:.0f} us a call")
    if arguments.json and dist.get_rank() == 0:
        arguments.json.write_text(json.dumps(table.rows, indent=1))


def copy_to_peer(buffer: Any, num_bytes: int) -> None:
    """The copy engine, from this rank's window to the next rank's: what the link gives with both directions in use."""
    from cuda.bindings import driver

    addresses, rank = buffer._endpoint.window.addresses, buffer.rank_idx
    offset = buffer._endpoint.layout["rows"].offset
    source, target = addresses[rank] + offset, addresses[(rank + 1) % len(addresses)] + offset
    (status,) = driver.cuMemcpyDtoDAsync(target, source, num_bytes, torch.cuda.current_stream().cuda_stream)
    assert int(status) == 0, status


if __name__ == "__main__":
    main()
