"""Time dispatch and combine end to end, on all ranks at once:

    torchrun --standalone --nproc-per-node 2 -m benchmarks.ep [--prefill 4096,8192] [--decode 1,128] [--sms 16,24,48]

Prefill sizes are called eagerly: ranks aligned on the GPU by a small all-reduce, L2 flushed, the host far ahead, so
that what is measured is what the streams see, from inputs ready to outputs ready. Decode sizes are called eagerly and
in a CUDA graph. SMs are all that any kernel of a call holds. The ceilings are measured in the same run. A table comes
last; the microseconds of kernels are in it, by the profiler, in a second pass.

--json and --plot write files. --trace makes nothing but a timeline, for chrome://tracing or ui.perfetto.dev. --repeat
only checks that so many runs are bit-identical. Three options have sizes of their own, unless others are given:

    --write-reference FILE   what later runs are compared with, for this kind of host
    --reference FILE         ends with 1 if a call is slower by more than --tolerance, as a multiple of its floor
    --check-model            ends with 1 if the model's number of SMs is worse by more than 5% than the best of a sweep
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import deep_ep
from benchmarks import gate
from benchmarks.ceilings import COPY_BYTES, Ceilings, barrier
from benchmarks.report import Reading, Report
from benchmarks.timing import MODES, Call, Stopwatch
from benchmarks.workload import CALLS, Shape, Workload, join

TRACED_SMS = 24
MODEL_WITHIN = 0.05

# What is measured unless something else is asked for.
USUAL = {
    "prefill": [4096, 8192],
    "decode": [1, 8, 32, 128, 256],
    "sms": [8, 16, 24, 32, 48, 64, 96],
    "decode_sms": [24],
}
GATED = {"prefill": [4096, 8192], "decode": [1, 128], "sms": [24, 48], "decode_sms": [24]}
SWEPT = {**USUAL, "decode": [1, 128], "decode_sms": USUAL["sms"]}


def numbers(text: str) -> list[int]:
    """Of what stands between commas; none is a list too."""
    found = [int(part) for part in text.split(",") if part]
    if any(number < 1 for number in found):
        raise ValueError
    return found


def writable(text: str) -> Path:
    """A file that can be written: better told now than after minutes."""
    path = Path(text)
    if not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.resolve().parent} is no folder")
    return path


def readable(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{path} is not there; --write-reference makes it")
    return path


def parse(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.ep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    Shape.add_arguments(parser)
    helps = {
        "prefill": "tokens a rank",
        "decode": "tokens a rank",
        "sms": "of prefill calls",
        "decode_sms": "of decode calls",
    }
    for name, text in helps.items():
        default = ",".join(map(str, USUAL[name]))
        option, metavar = f"--{name.replace('_', '-')}", "N,N,..."
        parser.add_argument(option, type=numbers, metavar=metavar, help=f"{text} (default: {default}; '' for none)")
    parser.add_argument("--calls", default="", metavar="PART", help=f"of the names: {'; '.join(CALLS)}")
    parser.add_argument("--iterations", type=int, default=30, metavar="N", help="of each call (default: %(default)s)")
    parser.add_argument("--no-kernels", action="store_true", help="leave out the profiler's pass")
    parser.add_argument("--json", type=writable, metavar="FILE")
    parser.add_argument("--plot", type=writable, metavar="FILE")
    parser.add_argument("--trace", type=writable, metavar="FILE")
    parser.add_argument("--repeat", type=int, default=0, metavar="N")
    parser.add_argument("--write-reference", type=writable, metavar="FILE")
    parser.add_argument("--reference", type=readable, metavar="FILE")
    parser.add_argument("--tolerance", type=float, default=0.1, metavar="PART", help="(default: %(default)s)")
    parser.add_argument("--check-model", action="store_true")
    arguments = parser.parse_args(given)
    if arguments.iterations < 2:
        parser.error("--iterations must be 2 or more: one reading has no spread")
    if arguments.write_reference and arguments.calls:
        parser.error("--write-reference takes the place of all that a host had, so --calls must not leave any out")
    arguments.gates = bool(arguments.reference or arguments.write_reference)
    usual = SWEPT if arguments.check_model else GATED if arguments.gates else USUAL
    for name, sizes in usual.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, sizes)
    if not arguments.prefill and (arguments.trace or arguments.repeat or not arguments.decode):
        parser.error("--prefill must not be empty here")
    return arguments


def main() -> int:
    arguments = parse()
    group, device = join("benchmarks.ep")
    largest = max([*arguments.prefill, *arguments.decode, -(-2 * COPY_BYTES // (2 * arguments.hidden))])
    buffer = Shape.of(arguments, largest).build(group)
    failed = False
    if arguments.repeat:
        check_repeat(arguments.repeat, Workload(Shape.of(arguments, arguments.prefill[0]), buffer, device))
    elif arguments.trace:
        trace(arguments.trace, Workload(Shape.of(arguments, arguments.prefill[0]), buffer, device))
    else:
        stopwatch = Stopwatch(device)
        ceilings = Ceilings.measure(buffer, stopwatch, arguments.iterations)
        report = Report(title(arguments, buffer, ceilings), facts(arguments, buffer, ceilings))
        measure(arguments, report, buffer, stopwatch, ceilings, device)
        failed = finish(arguments, report, functools.partial(choice, buffer, arguments.topk))
    buffer.destroy()
    dist.destroy_process_group()
    return int(failed)


def choice(buffer: deep_ep.ElasticBuffer, topk: int, name: str, tokens: int) -> int:
    """The SMs that a call takes when it is told none."""
    return buffer._end().num_sms(0, CALLS[name].kind, topk, tokens)


def facts(arguments: argparse.Namespace, buffer: deep_ep.ElasticBuffer, ceilings: Ceilings) -> dict[str, Any]:
    """What readings depend on."""
    commit = ""
    with contextlib.suppress(OSError):  # a host may have neither git nor the history
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(),
        "ranks": buffer.num_ranks,
        "hidden": arguments.hidden,
        "topk": arguments.topk,
        "experts": arguments.experts,
        "deep_ep": deep_ep.__version__,
        "commit": commit or "unknown",
        "torch": torch.__version__,
        "iterations": arguments.iterations,
        "link_gbs": round(ceilings.link_gbs, 1),
        "memory_gbs": round(ceilings.memory_gbs, 1),
        "launch_us": {mode: round(ceilings.launch_us[mode], 2) for mode in MODES},
        "latency_us": {mode: round(ceilings.latency_us[mode], 2) for mode in MODES},
    }


def title(arguments: argparse.Namespace, buffer: deep_ep.ElasticBuffer, ceilings: Ceilings) -> str:
    return (
        f"{buffer.num_ranks} x {torch.cuda.get_device_name()}, hidden {arguments.hidden}, top-{arguments.topk} of "
        f"{arguments.experts}; ceilings: link {ceilings.link_gbs:.0f} GB/s, memory {ceilings.memory_gbs:.0f} GB/s; "
        f"barrier {ceilings.latency_us['eager']:.1f} us, in a graph {ceilings.latency_us['graph']:.1f}"
    )


def cases(
    arguments: argparse.Namespace, buffer: deep_ep.ElasticBuffer, ceilings: Ceilings, device: torch.device
) -> Iterator[tuple[dict[str, Any], Call]]:
    """What is timed, in order: what is known of the reading (report.Reading) beforehand, and the call."""
    batches = [(tokens, "eager", arguments.sms) for tokens in arguments.prefill]
    batches += [(tokens, mode, arguments.decode_sms) for mode in MODES for tokens in arguments.decode]
    needs_no_host = arguments.gates or arguments.check_model  # else figures would say what the host's CPU is like
    if arguments.calls in "barrier":
        for mode in MODES:
            known = {"name": "barrier", "tokens": 0, "mode": mode, "sms": 1, "rank": buffer.rank_idx}
            yield {**known, "link_bytes": 0, "ceiling": 0.0, "floor": ceilings.launch_us[mode]}, lambda: barrier(buffer)
    for tokens, mode, all_sms in batches:
        workload = Workload(Shape.of(arguments, tokens), buffer, device)
        for name, call in CALLS.items():
            if arguments.calls not in name or (not call.captures and (mode == "graph" or needs_no_host)):
                continue
            link_bytes = call.link_bytes(workload)
            floor = ceilings.floor_us(link_bytes, mode)
            for sms in (
                sorted({*all_sms, choice(buffer, arguments.topk, name, tokens)}) if arguments.check_model else all_sms
            ):
                known = {"name": name, "tokens": tokens, "mode": mode, "sms": sms, "rank": buffer.rank_idx}
                known |= {"link_bytes": link_bytes, "ceiling": ceilings.link_us(link_bytes), "floor": floor}
                yield known, call.prepare(workload, sms)


def hosts(stopwatch: Stopwatch, ready: Call, known: dict[str, Any]) -> dict[str, float | None]:
    """What the host spends on a call, which waits for its end on the current stream, and on one that does not."""
    if known["mode"] != "eager":
        return {"host": None}
    if known["name"] == "barrier":
        return {"host": stopwatch.host(ready)}
    asynchronous = functools.partial(ready, async_with_compute_stream=True)
    return {"host": stopwatch.host(ready), "host_async": stopwatch.host(asynchronous)}


def measure(
    arguments: argparse.Namespace,
    report: Report,
    buffer: deep_ep.ElasticBuffer,
    stopwatch: Stopwatch,
    ceilings: Ceilings,
    device: torch.device,
) -> None:
    """Time everything; and then once more, since the profiler disturbs, how long kernels take."""
    for known, ready in cases(arguments, buffer, ceilings, device):
        times = stopwatch.times(known["mode"], ready, arguments.iterations)
        report.add(Reading.of(times, **hosts(stopwatch, ready, known), **known))
    if arguments.json and dist.get_rank() == 0:  # whatever becomes of the second pass
        report.write_json(arguments.json)
    if arguments.no_kernels or arguments.gates or arguments.check_model:
        return
    for i, (known, ready) in enumerate(cases(arguments, buffer, ceilings, device)):
        report.add_kernels(i, stopwatch.kernels(known["mode"], ready))


def finish(arguments: argparse.Namespace, report: Report, choose: Callable[[str, int], int]) -> bool:
    """Say and write what was found; returns whether something is worse than it may be. ``choose``: see check_model."""
    if dist.get_rank() != 0:
        return False
    if arguments.json:  # with the kernels
        report.write_json(arguments.json)
    report.print()
    if arguments.plot:
        report.write_plot(arguments.plot)
    failures: list[str] = []
    if arguments.reference:
        where = arguments.reference, report.facts, report.readings
        verdict = gate.compare(*where, arguments.tolerance, arguments.calls)
        failures += tell(f"Compared with {arguments.reference}, up to {arguments.tolerance:.0%} slower", verdict)
    if arguments.check_model:
        verdict = gate.check_model(report.readings, choose, MODEL_WITHIN)
        failures += tell(f"The model's SMs, up to {MODEL_WITHIN:.0%} slower than the best", verdict)
    if arguments.write_reference:
        gate.write_reference(arguments.write_reference, report.facts, report.readings)
        print(f"{arguments.write_reference} holds this run of {gate.host_of(report.facts)}")
    return bool(failures)


def tell(what: str, verdict: gate.Verdict) -> list[str]:
    print(f"{what}: {f'{len(verdict.failures)} FAILED' if verdict.failures else 'OK'}")
    for line in [*verdict.notes, *(f"FAILED {failure}" for failure in verdict.failures)]:
        print(f"  {line}")
    return verdict.failures


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
