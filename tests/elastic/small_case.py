"""A few tiny calls on two ranks, for tools that make a program slow:

compute-sanitizer --tool memcheck --target-processes all torchrun --nproc-per-node 2 -m tests.elastic.small_case

Uses GPUs if there are any, else simulated ranks. Ends with 0 if every result is right.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
import torch.distributed as dist

import deep_ep
from tests.elastic import cases, combines, ranks

SMALL = cases.Case(
    seed=1,
    tokens=(5, 3),
    hidden=64,
    num_topk=3,
    num_experts=8,
    kind="random",
    alignment=4,
    do_cpu_sync=True,
    with_weights=True,
    num_biases=1,
    num_sms=2,
    spare_tokens=1,
)
ANOTHER = cases.Case(
    seed=2,
    tokens=(0, 7),
    hidden=136,
    num_topk=2,
    num_experts=4,
    kind="holes",
    alignment=1,
    do_cpu_sync=False,
    with_weights=False,
    num_biases=0,
    num_sms=1,
    spare_tokens=0,
    barrier=True,
)


def main() -> int:
    group, device = ranks.join("cuda" if torch.cuda.is_available() else "simulated")
    if group.size() != len(SMALL.tokens):
        raise SystemExit(f"this runs on {len(SMALL.tokens)} ranks, not on {group.size()}")
    buffer = deep_ep.ElasticBuffer(
        group, num_max_tokens_per_rank=16, hidden=136, num_topk=4, allow_multiple_reduction=False
    )
    sums = replace(SMALL, combining=combines.Options(expanded=True))
    every_row = replace(SMALL, combining=combines.Options(expanded=True, multiple_reduction=False))
    for case in (SMALL, ANOTHER, sums, every_row, SMALL):
        error: BaseException | None = None
        try:
            cases.run(case, buffer, device)
        except Exception as caught:  # reported by all ranks together
            error = caught
        failures = cases.agree_on_failure(error, group)
        if failures:
            print(*failures, f"case: {case}", sep="\n")
            return 1
    buffer.destroy()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
