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

What would end it with 1 is timed again three times, by turns, and so is all that a reference gets; the least disturbed
of the three is what counts then (* in the table).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import deep_ep
from benchmarks import gate
from benchmarks.ceilings import COPY_BYTES, Ceilings, barrier
from benchmarks.report import Reading, Report, drawable, gathered, writable
from benchmarks.timing import MODES, Call, Stopwatch
from benchmarks.workload import CALLS, Shape, Workload, join

TRACED_SMS = 24
MODEL_WITHIN = 0.05
SECOND_LOOKS = 3  # at each reading that is doubtful, by turns: what disturbs one may last a while
MOST_DOUBTFUL = 30  # readings to look at again: what makes them more is no moment's noise

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


def reference(text: str) -> Path:
    """One that can be read."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{path} is not there; --write-reference makes it")
    try:
        gate.hosts_in(path)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path


def reference_to_write(text: str) -> Path:
    """One that can be written, if what is there already is one: other hosts' figures stay in it."""
    path = writable(text)
    return reference(text) if path.exists() else path


def part_of_a_name(text: str) -> str:
    names = [*CALLS, "barrier"]
    if not any(text in name for name in names):
        raise argparse.ArgumentTypeError(f"{text!r} is part of none of {'; '.join(names)}")
    return text


def tolerance(text: str) -> float:
    part = float(text)
    if not 0 <= part < math.inf:
        raise ValueError
    return part


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
    names = f"of the names: {'; '.join(CALLS)}"
    parser.add_argument("--calls", type=part_of_a_name, default="", metavar="PART", help=names)
    parser.add_argument("--iterations", type=int, default=30, metavar="N", help="of each call (default: %(default)s)")
    parser.add_argument("--no-kernels", action="store_true", help="leave out the profiler's pass")
    parser.add_argument("--json", type=writable, metavar="FILE")
    parser.add_argument("--plot", type=drawable, metavar="FILE")
    parser.add_argument("--trace", type=writable, metavar="FILE")
    parser.add_argument("--repeat", type=int, default=0, metavar="N")
    parser.add_argument("--write-reference", type=reference_to_write, metavar="FILE")
    parser.add_argument("--reference", type=reference, metavar="FILE")
    parser.add_argument("--tolerance", type=tolerance, default=0.1, metavar="PART", help="(default: %(default)s)")
    parser.add_argument("--check-model", action="store_true")
    arguments = parser.parse_args(given)
    if arguments.iterations < 2:
        parser.error("--iterations must be 2 or more: one reading has no spread")
    if arguments.repeat == 1 or arguments.repeat < 0:
        parser.error("--repeat must be 2 or more: one run has nothing to differ from")
    arguments.gates = bool(arguments.reference or arguments.write_reference)
    if (arguments.repeat or arguments.trace) and (arguments.gates or arguments.check_model):
        parser.error("--repeat and --trace time nothing that could be compared; leave the other options out")
    if arguments.write_reference and arguments.check_model:
        parser.error("--write-reference and --check-model have different sizes; make two runs")
    if arguments.write_reference and arguments.calls:
        parser.error("--write-reference takes the place of all that a host had, so --calls must not leave any out")
    usual = SWEPT if arguments.check_model else GATED if arguments.gates else USUAL
    for name, sizes in usual.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, sizes)
    if not arguments.prefill and (arguments.trace or arguments.repeat or not arguments.decode):
        parser.error("--prefill must not be empty here")
    return arguments


def require(modules: list[str]) -> None:
    """End with what to install, before minutes are spent."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        sys.exit(f"benchmarks.ep needs {' and '.join(missing)}: pip install 'deep_ep[examples]'")


def main() -> int:
    arguments = parse()
    require(["rich"] if not arguments.plot else ["rich", "matplotlib"])
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
        failed = Bench(arguments, buffer, stopwatch, ceilings, device).run()
    buffer.destroy()
    dist.destroy_process_group()
    return int(failed)


def save(path: Path | None, write: Callable[[Path], None]) -> bool:
    """If a file was asked for; returns False, and says why, if it could not be written: the rest is not lost for it."""
    try:
        if path is not None:
            write(path)
    except (OSError, ValueError) as error:
        print(f"{path} was not written: {error}", flush=True)
        return False
    return True


class Case(NamedTuple):
    """What is timed."""

    known: dict[str, Any]  # of the reading (report.Reading) beforehand
    prepare: Callable[[], Call]


class Bench:
    """One run. Collective: ``run``, and of what it calls ``reading_of``, ``look_again`` and ``verdicts``."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        buffer: deep_ep.ElasticBuffer,
        stopwatch: Stopwatch,
        ceilings: Ceilings,
        device: torch.device,
    ) -> None:
        self.arguments, self.buffer, self.stopwatch = arguments, buffer, stopwatch
        self.ceilings, self.device = ceilings, device
        self.report = Report(self.title(), self.facts())

    def run(self) -> bool:
        """Time everything, say and write what was found; returns whether anything is worse than it may be, or not
        written."""
        arguments, report = self.arguments, self.report
        for case in self.cases():
            report.add(self.reading_of(case))
        if dist.get_rank() == 0:  # whatever becomes of what follows
            save(arguments.json, report.write_json)
        if not (arguments.no_kernels or arguments.gates or arguments.check_model):
            # In a pass of its own, since the profiler disturbs.
            for i, case in enumerate(self.cases()):
                report.add_kernels(i, self.stopwatch.kernels(case.known["mode"], case.prepare()))
        verdicts, looked = self.verdicts(), set[int]()
        while doubtful := self.doubtful(verdicts) - looked:
            self.look_again(doubtful)
            looked |= doubtful
            verdicts = self.verdicts()
        is_saved = self.publish(verdicts) if dist.get_rank() == 0 else True
        return not is_saved or any(verdict.failures for verdict in verdicts.values())

    def cases(self) -> Iterator[Case]:
        """What is timed, in order."""
        arguments, ceilings = self.arguments, self.ceilings
        batches = [(tokens, "eager", arguments.sms) for tokens in arguments.prefill]
        batches += [(tokens, mode, arguments.decode_sms) for mode in MODES for tokens in arguments.decode]
        needs_no_host = arguments.gates or arguments.check_model  # else figures would say what the host's CPU is like
        if arguments.calls in "barrier":
            for mode in MODES:
                known = {"name": "barrier", "tokens": 0, "mode": mode, "sms": 1, "rank": self.buffer.rank_idx}
                known |= {"link_bytes": 0, "ceiling": 0.0, "floor": ceilings.launch_us[mode]}
                yield Case(known, lambda: functools.partial(barrier, self.buffer))
        for tokens, mode, all_sms in batches:
            workload = Workload(Shape.of(arguments, tokens), self.buffer, self.device)
            for name, call in CALLS.items():
                if arguments.calls not in name or (not call.captures and (mode == "graph" or needs_no_host)):
                    continue
                link_bytes = call.link_bytes(workload)
                known = {"name": name, "tokens": tokens, "mode": mode, "rank": self.buffer.rank_idx}
                known |= {"link_bytes": link_bytes, "ceiling": ceilings.link_us(link_bytes)}
                known |= {"floor": ceilings.floor_us(link_bytes, mode)}
                for sms in sorted({*all_sms, self.choice(name, tokens)}) if arguments.check_model else all_sms:
                    yield Case(known | {"sms": sms}, functools.partial(call.prepare, workload, sms))

    def reading_of(self, case: Case) -> Reading:
        known, ready = case.known, case.prepare()
        times = self.stopwatch.times(known["mode"], ready, self.arguments.iterations)
        return Reading.of(times, **self.hosts(ready, known), **known)

    def hosts(self, ready: Call, known: dict[str, Any]) -> dict[str, float | None]:
        """What the host spends on a call, which waits for its end on the current stream, and on one that does not."""
        if known["mode"] != "eager":
            return {"host": None}
        if known["name"] == "barrier":
            return {"host": self.stopwatch.host(ready)}
        asynchronous = functools.partial(ready, async_with_compute_stream=True)
        return {"host": self.stopwatch.host(ready), "host_async": self.stopwatch.host(asynchronous)}

    def doubtful(self, verdicts: dict[str, gate.Verdict]) -> set[int]:
        """Readings to time again: whatever a reference gets, or what failures come from."""
        everything = set(range(len(self.report.readings)))
        if self.arguments.write_reference:
            return everything
        found = set[int]().union(*(verdict.doubtful for verdict in verdicts.values()))
        if len(found) <= MOST_DOUBTFUL:
            return found
        if dist.get_rank() == 0:
            print(f"{len(found)} readings to look at again: that is no noise, so none is", flush=True)
        return set()

    def look_again(self, doubtful: set[int]) -> None:
        """Time these readings' calls again, by turns."""
        if dist.get_rank() == 0:
            print(f"A second look at {len(doubtful)} of {len(self.report.readings)} readings:", flush=True)
        turns: dict[int, list[list[float]]] = {i: [] for i in sorted(doubtful)}
        for _ in range(SECOND_LOOKS):
            for i, case in enumerate(self.cases()):
                if i in turns:
                    found = self.stopwatch.times(case.known["mode"], case.prepare(), self.arguments.iterations)
                    turns[i].append(found)
        for i, looks in turns.items():
            self.report.look_again(i, looks)

    def choice(self, name: str, tokens: int) -> int:
        """The SMs that a call takes when it is told none."""
        return self.buffer._end().num_sms(0, CALLS[name].kind, self.arguments.topk, tokens)

    def verdicts(self) -> dict[str, gate.Verdict]:
        """Of what was asked for: what it is about, and how it is; on all ranks what rank 0 finds."""
        return gathered(self.judge() if dist.get_rank() == 0 else {})[0]

    def judge(self) -> dict[str, gate.Verdict]:
        """Verdicts of one rank."""
        arguments, report = self.arguments, self.report
        found = {}
        if arguments.reference:
            found[f"Compared with {arguments.reference}, up to {arguments.tolerance:.0%} slower"] = gate.compare(
                arguments.reference, report.facts, report.readings, arguments.tolerance, arguments.calls
            )
        if arguments.check_model:
            found[f"The model's SMs, up to {MODEL_WITHIN:.0%} slower than the best"] = gate.check_model(
                report.readings, self.choice, MODEL_WITHIN
            )
        return found

    def publish(self, verdicts: dict[str, gate.Verdict]) -> bool:
        """On one rank; returns whether all could be written."""
        arguments, report = self.arguments, self.report
        report.print()
        for what, verdict in verdicts.items():
            print(f"{what}: {f'{len(verdict.failures)} FAILED' if verdict.failures else 'OK'}")
            for line in [*verdict.notes, *(f"FAILED {failure}" for failure in verdict.failures)]:
                print(f"  {line}")
        write_reference = functools.partial(gate.write_reference, facts=report.facts, readings=report.readings)
        files: list[tuple[Path | None, Callable[[Path], None]]] = [
            (arguments.json, report.write_json),  # with the kernels, and with second looks
            (arguments.write_reference, write_reference),
            (arguments.plot, report.write_plot),
        ]
        lacking = [path for path, write in files if not save(path, write)]
        return not lacking

    def facts(self) -> dict[str, Any]:
        """What readings depend on."""
        arguments, ceilings = self.arguments, self.ceilings
        commit = ""
        with contextlib.suppress(OSError):  # a host may have neither git nor the history
            command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
            commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        return {
            "device": torch.cuda.get_device_name(),
            "ranks": self.buffer.num_ranks,
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

    def title(self) -> str:
        arguments, ceilings = self.arguments, self.ceilings
        return (
            f"{self.buffer.num_ranks} x {torch.cuda.get_device_name()}, hidden {arguments.hidden}, "
            f"top-{arguments.topk} of {arguments.experts}; ceilings: link {ceilings.link_gbs:.0f} GB/s, memory "
            f"{ceilings.memory_gbs:.0f} GB/s; barrier {ceilings.latency_us['eager']:.1f} us, in a graph "
            f"{ceilings.latency_us['graph']:.1f}"
        )


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
