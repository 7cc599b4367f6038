"""Time dispatch and combine end to end, on all ranks at once:

    torchrun --standalone --nproc-per-node 2 -m benchmarks.ep [--prefill 4096,8192] [--decode 1,128] [--sms 16,24,48]

Prefill sizes are called eagerly: ranks aligned on the GPU by a small all-reduce, L2 flushed, the host far ahead, so
that what is measured is what the streams see, from inputs ready to outputs ready. Decode sizes are called eagerly and
in a CUDA graph. SMs are all that any kernel of a call holds. The ceilings are measured in the same run.

--json and --plot write files, --trace one for chrome://tracing, --reference compares with an earlier --json file and
ends with 1 if any call's part of the ceiling is worse by more than --tolerance. --repeat N only checks that N runs are
bit-identical.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import deep_ep
from benchmarks.ceilings import COPY_BYTES, Ceilings
from benchmarks.report import Reading, Report, drifted
from benchmarks.timing import Stopwatch
from benchmarks.workload import CALLS, Shape, Workload, join

TRACED_SMS = 24


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Shape.add_arguments(parser)
    parser.add_argument("--prefill", type=numbers, default=[4096, 8192], help="tokens a rank")
    parser.add_argument("--decode", type=numbers, default=[1, 8, 32, 128, 256], help="tokens a rank")
    parser.add_argument("--sms", type=numbers, default=[8, 16, 24, 32, 48, 96])
    parser.add_argument("--decode-sms", type=numbers, default=[24])
    parser.add_argument("--calls", default="", help=f"part of a name; of: {'; '.join(CALLS)}")
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--repeat", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.1)
    arguments = parser.parse_args()
    if arguments.reference and not arguments.json:
        parser.error("--reference compares with what --json writes: give both")
    return arguments


def main() -> int:
    arguments = parse()
    group, device = join()
    largest = max([*arguments.prefill, *arguments.decode, -(-2 * COPY_BYTES // (2 * arguments.hidden))])
    buffer = Shape.of(arguments, largest).build(group)
    failed = False
    if arguments.repeat:
        check_repeat(arguments.repeat, Workload(Shape.of(arguments, arguments.prefill[0]), buffer, device))
    elif arguments.trace:
        trace(arguments.trace, Workload(Shape.of(arguments, arguments.prefill[0]), buffer, device))
    else:
        failed = measure(arguments, buffer, device)
    buffer.destroy()
    dist.destroy_process_group()
    return int(failed)


def measure(arguments: argparse.Namespace, buffer: deep_ep.ElasticBuffer, device: torch.device) -> bool:
    """Time everything; returns whether anything has drifted from the reference."""
    stopwatch = Stopwatch(device)
    ceilings = Ceilings.measure(buffer, stopwatch, arguments.iterations)
    facts = {
        "device": torch.cuda.get_device_name(),
        "ranks": buffer.num_ranks,
        "torch": torch.__version__,
        "deep_ep": deep_ep.__version__,
        "link_gbs": round(ceilings.link_gbs, 1),
        "memory_gbs": round(ceilings.memory_gbs, 1),
    }
    title = (
        f"{buffer.num_ranks} x {facts['device']}, hidden {arguments.hidden}, top-{arguments.topk} of "
        f"{arguments.experts}; ceilings: link {ceilings.link_gbs:.0f} GB/s, memory {ceilings.memory_gbs:.0f} GB/s"
    )
    report = Report(title, facts)
    plan = [(tokens, "eager", arguments.sms) for tokens in arguments.prefill]
    plan += [(tokens, mode, arguments.decode_sms) for mode in ("eager", "graph") for tokens in arguments.decode]
    for tokens, mode, all_sms in plan:
        workload = Workload(Shape.of(arguments, tokens), buffer, device)
        for name, call in CALLS.items():
            if arguments.calls not in name or (mode == "graph" and not call.captures):
                continue
            for sms in all_sms:
                ready = call.prepare(workload, sms)
                times = (stopwatch.graph if mode == "graph" else stopwatch.eager)(ready, arguments.iterations)
                reading = Reading.of(
                    times,
                    name=name,
                    tokens=tokens,
                    mode=mode,
                    sms=sms,
                    rank=buffer.rank_idx,
                    link_bytes=call.link_bytes(workload),
                    ceiling=call.link_bytes(workload) / ceilings.link_gbs / 1e3,
                    host=0.0 if mode == "graph" else stopwatch.host(ready),
                )
                report.add(reading)
                del ready
    return finish(arguments, report)


def finish(arguments: argparse.Namespace, report: Report) -> bool:
    if dist.get_rank() != 0:
        return False
    report.print()
    if arguments.json:
        report.write_json(arguments.json)
    if arguments.plot:
        report.write_plot(arguments.plot)
    found = drifted(arguments.json, arguments.reference, arguments.tolerance) if arguments.reference else []
    print(*found, sep="\n")
    return bool(found)


def check_repeat(times: int, workload: Workload) -> None:
    """Results of many runs, at changing SM counts, must not differ by a bit."""
    reference: list[torch.Tensor] = []
    for i in range(times):
        sync = i % 2 == 0
        results = workload.dispatch([24, 8, 16, 48][i % 4], workload.x, do_cpu_sync=sync)
        recv_x, recv_idx, recv_weights, handle, _ = results
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


def trace(path: Path, workload: Workload) -> None:
    """A timeline of every call, three times each; and what the kernels take, on the terminal."""
    ready: dict[str, Any] = {name: call.prepare(workload, TRACED_SMS) for name, call in CALLS.items()}
    for call in ready.values():
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile() as profiler:
        for name, call in ready.items():
            for _ in range(3):
                with torch.profiler.record_function(name):
                    call()
                torch.cuda.synchronize()
                dist.barrier()
    if dist.get_rank() == 0:
        profiler.export_chrome_trace(str(path))
        print(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=20))


if __name__ == "__main__":
    sys.exit(main())
