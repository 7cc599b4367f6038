"""One rank of the round-trip swarm:

torchrun --nproc-per-node 4 -m tests.elastic.worker --seeds 0:20 [--machine cuda]
"""

from __future__ import annotations

import argparse
import sys

import torch.distributed as dist

import deep_ep
from tests.elastic import cases, ranks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0:10", help="first:last, the last not included")
    parser.add_argument("--machine", choices=ranks.MACHINES, default="simulated")
    parser.add_argument("--largest", type=int, default=24, help="tokens of a rank, at most")
    parser.add_argument("--longest", type=int, default=1024, help="values of a row, at most")
    arguments = parser.parse_args()
    first, last = map(int, arguments.seeds.split(":"))

    group, device = ranks.join(arguments.machine)
    buffer = deep_ep.ElasticBuffer(
        group,
        num_max_tokens_per_rank=arguments.largest + 8,
        hidden=arguments.longest,
        allow_multiple_reduction=False,
        num_gpu_timeout_secs=10,
        num_cpu_timeout_secs=20,
    )
    for seed in range(first, last):
        case = cases.Case.draw(seed, group.size(), arguments.largest, arguments.longest)
        error: BaseException | None = None
        try:
            cases.run(case, buffer, device)
        except Exception as caught:  # reported by all ranks together
            error = caught
        failures = cases.agree_on_failure(error, group)
        if failures:
            if group.rank() == 0:
                print(*failures, f"case: {case}", sep="\n")
                print(
                    f"replay: torchrun --nproc-per-node {group.size()} -m tests.elastic.worker "
                    f"--seeds {seed}:{seed + 1} --machine {arguments.machine} --largest {arguments.largest} "
                    f"--longest {arguments.longest}"
                )
            dist.destroy_process_group()
            return 1
    if group.rank() == 0:
        print(f"{last - first} round trips on {group.size()} {arguments.machine} ranks: OK")
    buffer.destroy()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
