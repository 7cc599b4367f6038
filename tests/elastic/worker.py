"""One rank of many round trips, each compared with the oracle bit for bit:

torchrun --nproc-per-node 4 -m tests.elastic.worker --seeds 0:20 [--machine cuda]     drawn at random
torchrun --nproc-per-node 2 -m tests.elastic.worker --covering : [--machine cuda]     any two choices together
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist

from deep_ep import ElasticBuffer
from tests.elastic import cases, ranks, registered
from tests.elastic.memory import Memory, check_growth
from tests.elastic.watched import WatchedBuffer, forgotten

WARM_UP = 30  # trips, after which memory should not grow; of fewer than twice as many, half


def build(group: dist.ProcessGroup, largest: int, longest: int, timeout_s: float = 10) -> dict[str, ElasticBuffer]:
    """Two buffers: of settings, and of a number of bytes with everything else as it is not by default.

    Args:
        timeout_s: of kernels that wait for a peer; hosts wait twice as long.
    """
    sizes = {"num_max_tokens_per_rank": largest + 8, "hidden": longest}
    timeouts = {"num_gpu_timeout_secs": timeout_s, "num_cpu_timeout_secs": 2 * timeout_s}
    hint = ElasticBuffer.get_buffer_size_hint(group, **sizes, allow_multiple_reduction=False)
    return {
        "settings": WatchedBuffer(
            group, **sizes, allow_multiple_reduction=False, num_registered_bytes=registered.NUM_BYTES, **timeouts
        ),
        "bytes": WatchedBuffer(
            group,
            hint,
            num_cpu_bytes=1 << 21,
            num_topk=8,
            use_fp8_dispatch=True,
            deterministic=True,
            allow_hybrid_mode=False,
            prefer_overlap_with_compute=False,
            sl_idx=0,
            num_allocated_qps=2,
            explicitly_destroy=True,
        ),
    }


Picked = Iterator[tuple[str, cases.Case]]  # how to pick it alone, and what it is


def pick(arguments: argparse.Namespace, num_ranks: int) -> Picked:
    """All that were asked for, those of the covering set first."""
    sizes = (num_ranks, arguments.largest, arguments.longest)
    if arguments.covering is not None:
        first, _, last = arguments.covering.partition(":")
        for case in cases.Case.covering(*sizes)[int(first or 0) : int(last) if last else None]:
            yield f"--covering {case.seed}:{case.seed + 1}", case
    if arguments.seeds is not None or arguments.covering is None:
        for seed in range(*map(int, (arguments.seeds or "0:10").split(":"))):
            yield f"--seeds {seed}:{seed + 1}", cases.Case.draw(seed, *sizes)


def make_trips(
    picked: Picked, buffers: Mapping[str, ElasticBuffer], device: torch.device, group: dist.ProcessGroup
) -> int | None:
    """How many there were; None if one went wrong, which is printed."""
    num_trips = 0
    for alone, case in picked:
        error: BaseException | None = None
        try:
            cases.run(case, buffers[case.buffer], device)
        except Exception as caught:  # reported by all ranks together
            error = caught
        failures = cases.agree_on_failure(error, group)
        if failures:
            if group.rank() == 0:
                print(*failures, f"case: {case}", f"alone: {alone}", sep="\n")
            return None
        num_trips += 1
    return num_trips


def check_memory(
    picked: Picked, buffers: Mapping[str, ElasticBuffer], device: torch.device, group: dist.ProcessGroup
) -> int | None:
    """make_trips, after the first of which, half of them at most, memory must stay what it is."""
    all_picked = list(picked)
    num_first = min(WARM_UP, len(all_picked) // 2)
    if num_first == 0:
        raise SystemExit(f"{len(all_picked)} round trips say nothing about memory: --check-memory takes 2 at least")
    first = make_trips(iter(all_picked[:num_first]), buffers, device, group)
    if first is None:
        return None
    before = Memory.now(device)
    more = make_trips(iter(all_picked[num_first:]), buffers, device, group)
    if more is None:
        return None
    after = Memory.now(device)
    print(f"rank {group.rank()}: after {first} trips {before}; after {more} more {after}")
    error: AssertionError | None = None
    try:
        check_growth(before, after, more)
    except AssertionError as caught:
        error = caught
    failures = cases.agree_on_failure(error, group)
    if failures and group.rank() == 0:
        print(*failures, sep="\n")
    return None if failures else first + more


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", help="first:last, the last not included (0:10 unless --covering is given)")
    parser.add_argument("--covering", help="first:last of the covering set; either may be left out")
    parser.add_argument("--machine", choices=ranks.MACHINES, default="simulated")
    parser.add_argument("--largest", type=int, default=24, help="tokens of a rank, at most")
    parser.add_argument("--longest", type=int, default=1024, help="values of a row, at most")
    parser.add_argument("--check-memory", action="store_true", help="it must not grow")
    arguments = parser.parse_args()

    group, device = ranks.join(arguments.machine)
    buffers = build(group, arguments.largest, arguments.longest)
    start = time.perf_counter()
    run = check_memory if arguments.check_memory else make_trips
    num_trips = run(pick(arguments, group.size()), buffers, device, group)
    seconds, ok = time.perf_counter() - start, num_trips is not None
    if ok and arguments.covering == ":" and (left := list(forgotten())):
        print(*left, sep="\n")
        ok = False
    if ok:
        for buffer in buffers.values():
            buffer.destroy()
        if group.rank() == 0:
            print(f"{num_trips} round trips on {group.size()} {arguments.machine} ranks: OK ({seconds:.1f} s)")
    elif group.rank() == 0:
        print(f"replay: torchrun --nproc-per-node {group.size()} -m tests.elastic.worker {' '.join(sys.argv[1:])}")
    dist.destroy_process_group()
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
