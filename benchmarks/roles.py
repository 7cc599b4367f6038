"""Which division of a block's warps and a launch's blocks is fastest:

    torchrun --nproc-per-node 2 -m benchmarks.roles --try-dispatch "10,3,1 20,3,1 9" --try-combine "3,4,1 20 24"

A crew is warps,stages,storing (deep_ep/plan.py). --try-dispatch is "send crew, receive crew, sending blocks",
--try-combine and --try-sums (combine of expanded rows) "send crew, warps of a block, sending blocks"; each may be given
many times. Prints the median of each in microseconds. With none, sweeps all around what plan.py holds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.timing import Stopwatch, Workload
from deep_ep import plan

DISPATCHES = [
    f"{send} {receive} {blocks}"
    for send in ("7,4,1", "7,4,2", "10,3,1", "14,2,1")
    for receive in ("14,2,1", "16,3,1", "20,3,1", "24,2,1")
    for blocks in (8, 9, 10)
]
COMBINES = [
    f"{send} {warps} {blocks}"
    for send in ("2,6,2", "3,4,1", "3,5,2", "4,3,1", "6,2,1")
    for warps in (16, 20, 24)
    for blocks in (8, 12, 16, 24)
]

SUMS = [
    f"{send} {warps} {blocks}"
    for send in ("4,3,1", "5,3,1", "7,2,1", "10,2,1")
    for warps in (16, 20)
    for blocks in (12, 24)
]


def crew(text: str) -> plan.Crew:
    return plan.Crew(*map(int, text.split(",")))


def parse_dispatch(text: str, num_sms: int) -> plan.Roles:
    send, receive, blocks = text.split()
    return plan.Roles(crew(send), crew(receive), int(blocks) / num_sms)


def parse_combine(text: str, num_sms: int) -> plan.CombineRoles:
    send, warps, blocks = text.split()
    return plan.CombineRoles(crew(send), int(warps), int(blocks) / num_sms)


def divisions(arguments: argparse.Namespace, usual: plan.RolesOfMachine) -> Iterator[tuple[str, plan.RolesOfMachine]]:
    """What to time, and with which roles; the other kernels keep their usual ones."""
    dispatches, combines, sums = arguments.try_dispatch, arguments.try_combine, arguments.try_sums
    if not dispatches and not combines and not sums:
        dispatches, combines, sums = DISPATCHES, COMBINES, SUMS
    for text in dispatches:
        yield f"dispatch {text}", replace(usual, dispatch=parse_dispatch(text, arguments.sms))
    for text in combines:
        yield f"combine {text}", replace(usual, combine=parse_combine(text, arguments.sms))
    for text in sums:
        yield f"sums {text}", replace(usual, combine_sums=parse_combine(text, arguments.sms))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Workload.add_arguments(parser)
    parser.add_argument("--sms", type=int, default=24)
    parser.add_argument("--try-dispatch", action="append", default=[])
    parser.add_argument("--try-combine", action="append", default=[])
    parser.add_argument("--try-sums", action="append", default=[])
    parser.add_argument("--iterations", type=int, default=11)
    arguments = parser.parse_args()
    workload = Workload.make(arguments)
    endpoint, buffer = workload.buffer._endpoint, workload.buffer
    assert endpoint is not None
    stopwatch = Stopwatch(workload.x.device)
    recv_x, _, recv_weights, handle, _ = workload.dispatch(arguments.sms, sync=True)
    expanded_x = torch.randn(handle.num_expanded_tokens, recv_x.shape[1], device=recv_x.device).bfloat16()

    def dispatch() -> Any:
        return workload.dispatch(arguments.sms)

    def combine() -> Any:
        handle.do_expand = False
        return buffer.combine(recv_x, handle, topk_weights=recv_weights)

    def combine_sums() -> Any:
        handle.do_expand = True
        return buffer.combine(expanded_x, handle)

    calls = {"dispatch": dispatch, "combine": combine, "sums": combine_sums}
    for text, roles in divisions(arguments, endpoint.roles):
        endpoint.roles = roles
        times = stopwatch.times(calls[text.split()[0]], arguments.iterations)
        if dist.get_rank() == 0:
            print(f"{text:<40} {statistics.median(times):6.1f}", flush=True)
    workload.close()


if __name__ == "__main__":
    main()
