"""Which division of a block's warps and a launch's blocks is fastest:

    torchrun --nproc-per-node 2 -m benchmarks.roles --sms 24 --try "10,3,1 20,3,1 9" --try "7,4,2 24,2,1 8"

Each --try is "send crew, receive crew, sending blocks": a crew is warps,stages,storing (deep_ep/plan.py). Prints
dispatch and combine, in microseconds, for each; without --try, a sweep around what plan.py holds.
"""

from __future__ import annotations

import argparse
import statistics

import torch.distributed as dist

from benchmarks.timing import Stopwatch, Workload
from deep_ep import plan

SWEEP = [
    f"{send} {receive} {blocks}"
    for send in ("7,4,1", "7,4,2", "10,3,1", "14,2,1")
    for receive in ("14,2,1", "16,3,1", "20,3,1", "24,2,1")
    for blocks in (8, 9, 10)
]


def parse(text: str, num_sms: int) -> plan.Roles:
    send, receive, blocks = text.split()
    crews = [plan.Crew(*map(int, crew.split(","))) for crew in (send, receive)]
    return plan.Roles(*crews, send_share=int(blocks) / num_sms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Workload.add_arguments(parser)
    parser.add_argument("--sms", type=int, default=24)
    parser.add_argument("--try", dest="tries", action="append", default=[])
    parser.add_argument("--iterations", type=int, default=11)
    arguments = parser.parse_args()
    workload = Workload.make(arguments)
    endpoint, buffer = workload.buffer._endpoint, workload.buffer
    assert endpoint is not None
    stopwatch = Stopwatch(workload.x.device)

    for text in arguments.tries or SWEEP:
        roles = parse(text, arguments.sms)
        endpoint.roles = plan.RolesOfMachine(dispatch=roles, combine=roles)
        dispatch = stopwatch.times(lambda: workload.dispatch(arguments.sms), arguments.iterations)
        recv_x, _, recv_weights, handle, _ = workload.dispatch(arguments.sms)

        def combine(recv_x=recv_x, recv_weights=recv_weights, handle=handle):  # type: ignore[no-untyped-def]
            return buffer.combine(recv_x, handle, topk_weights=recv_weights)

        combined = stopwatch.times(combine, arguments.iterations)
        if dist.get_rank() == 0:
            print(
                f"{text:<28} dispatch {statistics.median(dispatch):6.1f}   combine {statistics.median(combined):6.1f}",
                flush=True,
            )
    workload.close()


if __name__ == "__main__":
    main()
