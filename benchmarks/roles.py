"""Which division of a block's warps and a launch's blocks is fastest:

    torchrun --nproc-per-node 2 -m benchmarks.roles --try-dispatch "9,3,1 14,2,1 1.4" --try-combine "3,4,1 20 24 none"

A crew is warps,stages,storing (deep_ep/plan.py). --try-dispatch is "send crew, receive crew, send cost",
--try-combine and --try-sums (combine of expanded rows) "send crew, warps of a block, sending blocks, heralds or none";
each may be given many times. Prints the median of each in microseconds. With nothing to try, sweeps all around what
plan.py holds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import replace

import torch.distributed as dist

from benchmarks.timing import Stopwatch
from benchmarks.workload import CALLS, Shape, Workload, join
from deep_ep import plan

DISPATCHES = [
    f"{send} {receive} {cost}"
    for send in ("7,4,1", "9,3,1", "13,2,1")
    for receive in ("9,3,1", "14,2,1", "20,3,1")
    for cost in (1.0, 1.4, 2.0)
]
COMBINES = [
    f"{send} {warps} {blocks} {heralds}"
    for send in ("2,6,2", "3,4,1", "3,5,2", "4,3,1", "6,2,1")
    for warps in (16, 20)
    for blocks in (12, 24)
    for heralds in ("heralds", "none")
]

SUMS = [f"{send} {warps} 24 none" for send in ("4,2,1", "5,2,1", "6,2,1", "7,2,1") for warps in (12, 16)]


# What each kind of roles is timed with (workload.py).
TIMED = {
    "dispatch": ["dispatch", "dispatch, cached", "dispatch, expanded", "dispatch bf16"],
    "combine": ["combine"],
    "sums": ["combine, expanded"],
}


def crew(text: str) -> plan.Crew:
    return plan.Crew(*map(int, text.split(",")))


def parse_dispatch(text: str, usual: plan.Roles) -> plan.Roles:
    send, receive, cost = text.split()
    return replace(usual, send=crew(send), receive=crew(receive), send_cost=float(cost))


def parse_combine(text: str, num_sms: int) -> plan.CombineRoles:
    send, warps, blocks, heralds = text.split()
    return plan.CombineRoles(crew(send), int(warps), int(blocks) / num_sms, heralds=heralds == "heralds")


def divisions(
    arguments: argparse.Namespace, usual: plan.RolesOfMachine
) -> Iterator[tuple[str, str, plan.RolesOfMachine]]:
    """What to time, and with which roles; the other kernels keep their usual ones."""
    dispatches, combines, sums = arguments.try_dispatch, arguments.try_combine, arguments.try_sums
    if not dispatches and not combines and not sums:
        dispatches, combines, sums = DISPATCHES, COMBINES, SUMS
    for text in dispatches:
        yield "dispatch", text, replace(usual, dispatch=parse_dispatch(text, usual.dispatch))
    for text in combines:
        yield "combine", text, replace(usual, combine=parse_combine(text, arguments.sms))
    for text in sums:
        yield "sums", text, replace(usual, combine_sums=parse_combine(text, arguments.sms))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Shape.add_arguments(parser)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--sms", type=int, default=24)
    parser.add_argument("--try-dispatch", action="append", default=[])
    parser.add_argument("--try-combine", action="append", default=[])
    parser.add_argument("--try-sums", action="append", default=[])
    parser.add_argument("--iterations", type=int, default=11)
    arguments = parser.parse_args()
    group, device = join("benchmarks.roles")
    shape = Shape.of(arguments, arguments.tokens)
    buffer = shape.build(group)
    endpoint = buffer._endpoint
    assert endpoint is not None
    workload, stopwatch = Workload(shape, buffer, device), Stopwatch(device)
    calls = {kind: [(name, CALLS[name].prepare(workload, arguments.sms)) for name in TIMED[kind]] for kind in TIMED}
    for kind, text, roles in divisions(arguments, endpoint.roles):
        endpoint.roles = roles
        endpoint.plans.clear()
        medians = [
            f"{name} {statistics.median(stopwatch.eager(call, arguments.iterations)):.1f}" for name, call in calls[kind]
        ]
        if dist.get_rank() == 0:
            print(f"{kind} {text:<30} {'  '.join(medians)}", flush=True)
    buffer.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
