"""Tiny calls in which any two choices meet, on two ranks, for tools that make a program slow:

compute-sanitizer --tool memcheck --target-processes all torchrun --nproc-per-node 2 tests/elastic/small_case.py

Uses GPUs if there are any, else simulated ranks. Ends with 0 if every result is right.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys

import torch
import torch.distributed as dist

from tests.elastic import ranks, worker

LARGEST, LONGEST = 5, 136  # tokens of a rank, values of a row
PATIENCE = 120  # seconds that a kernel waits for a peer, which the tool makes slow as well
STALLED = 80  # seconds after which each rank says where it is, so that a tool's hang is not a riddle


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=40, help="so many of the covering set; the first ones hold most")
    parser.add_argument("--first", type=int, default=0, help="from this one on")
    arguments = parser.parse_args()
    faulthandler.dump_traceback_later(STALLED, repeat=True)
    machine = "cuda" if torch.cuda.is_available() else "simulated"
    group, device = ranks.join(machine)
    # As many scale factors as a case may have go beside rows that are this short.
    buffers = worker.build(group, LARGEST, longest=1024, timeout_s=PATIENCE)
    covering = f"{arguments.first}:{arguments.first + arguments.cases}"
    wanted = argparse.Namespace(covering=covering, seeds=None, largest=LARGEST, longest=LONGEST)
    num_trips = worker.make_trips(worker.pick(wanted, group.size()), buffers, device, group)
    if num_trips is None:
        return 1
    for buffer in buffers.values():
        buffer.destroy()
    if group.rank() == 0:
        print(f"{num_trips} small round trips on {group.size()} {machine} ranks: OK")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
