"""The benchmarks without a GPU: what they make of made-up times, what they refuse, what they compare."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import ep, gate, roles, sm
from benchmarks import report as reports
from benchmarks.ceilings import Ceilings
from benchmarks.report import Reading, Report, panels_of
from benchmarks.timing import MODES, kernel_times
from benchmarks.workload import CALLS
from deep_ep import ElasticBuffer

ROOT = Path(__file__).resolve().parents[2]
FACTS = {"device": "Made Up", "ranks": 2, "hidden": 7168, "topk": 8, "experts": 256, "link_gbs": 361.0}
CEILINGS = Ceilings(360.0, 4000.0, launch_us=dict.fromkeys(MODES, 2.0), latency_us={"eager": 6.0, "graph": 4.0})
SMALL = ["--hidden", "64", "--experts", "4", "--topk", "2", "--prefill", "8,16", "--decode", "1,4", "--iterations", "3"]


def reading(median: float = 150.0, **changes: Any) -> Reading:
    known = {"name": "dispatch", "tokens": 4096, "mode": "eager", "sms": 24, "rank": 0, "link_bytes": 36_000_000}
    known |= {"ceiling": 100.0, "floor": 106.0, "host": 80.0, "host_async": 70.0}
    return replace(Reading.of([0.9 * median, median, 1.1 * median], **known), **changes)


def both(first: Reading, factor: float = 1.01) -> list[Reading]:
    """Of two ranks."""
    return [first, replace(first, rank=1, median=first.median * factor)]


RUN = [
    both(reading()),
    both(reading(140.0, sms=48)),
    both(reading(20.0, name="combine", tokens=128, mode="graph", floor=8.0)),
    both(reading(4.4, name="barrier", tokens=0, mode="graph", sms=1, link_bytes=0, ceiling=0.0, floor=2.0, host=None)),
]


def slower(name: str, factor: float) -> list[list[Reading]]:
    """The run, with a call whose times are so many times as long."""
    return [[replace(r, median=r.median * (factor if r.name == name else 1)) for r in each] for each in RUN]


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    path = tmp_path / "reference.json"
    gate.write_reference(path, FACTS, RUN)
    return path


# The speed gate


def test_reference_is_small_and_readable(reference: Path) -> None:
    (host, kept), *others = json.loads(reference.read_text()).items()
    assert (host, others) == ("2 x Made Up, hidden 7168, top-8 of 256", [])
    assert kept["measured"] == FACTS
    assert kept["times_floor"] == {
        "barrier": {"graph": 2.22},
        "combine": {"128 tokens, graph, 24 SMs": 2.52},
        "dispatch": {"4096 tokens, eager, 24 SMs": 1.43, "4096 tokens, eager, 48 SMs": 1.33},
    }


def test_the_same_run_passes(reference: Path) -> None:
    assert gate.compare(reference, FACTS, RUN, 0.1) == gate.Verdict([], [])


@pytest.mark.parametrize("name", ["dispatch", "combine", "barrier"])
def test_drift(reference: Path, name: str) -> None:
    """Up fails, and says what and by how much; within passes; down is told."""
    within = gate.compare(reference, FACTS, slower(name, 1.08), 0.1)
    assert within == gate.Verdict([], [])
    up = gate.compare(reference, FACTS, slower(name, 1.12), 0.1)
    assert up.failures
    assert all(line.startswith(f"{name} | ") and "(+1" in line for line in up.failures)
    assert up.doubtful == {i for i, each in enumerate(RUN) if each[0].name == name}
    assert not gate.compare(reference, FACTS, slower(name, 1.12), 0.2).failures
    down = gate.compare(reference, FACTS, slower(name, 0.8), 0.1)
    assert (down.failures, all("better; make bench-reference" in line for line in down.notes)) == ([], True)
    assert len(down.notes) == len(up.failures)


def test_a_slower_host_is_no_drift(reference: Path) -> None:
    """Floors and times move together."""
    all_slower = [[replace(r, median=1.3 * r.median, floor=1.3 * r.floor) for r in each] for each in RUN]
    assert gate.compare(reference, FACTS, all_slower, 0.1) == gate.Verdict([], [])


def test_one_slow_rank_is_enough(reference: Path) -> None:
    run = [[RUN[0][0], replace(RUN[0][1], median=2 * RUN[0][1].median)], *RUN[1:]]
    assert len(gate.compare(reference, FACTS, run, 0.1).failures) == 1


def test_missing_figures_are_named(reference: Path) -> None:
    gone = gate.compare(reference, FACTS, RUN[1:], 0.1)
    assert gone.failures == [f"dispatch | 4096 tokens, eager, 24 SMs: not measured, but {reference} has it"]
    assert not gate.compare(reference, FACTS, RUN[2:3], 0.1, calls="combine").failures
    new = [*RUN, both(reading(30.0, name="combine, expanded", floor=10.0))]
    (line,) = gate.compare(reference, FACTS, new, 0.1).failures
    assert line.startswith("combine, expanded | 4096 tokens, eager, 24 SMs: 3.03 x its floor, but ")
    assert line.endswith("reference.json lacks it; make bench-reference adds it")


def test_other_hardware_is_named(reference: Path) -> None:
    others = {**FACTS, "device": "Another"}
    (line,) = gate.compare(reference, others, RUN, 0.1).failures
    assert "nothing of 2 x Another, hidden 7168, top-8 of 256, but of 2 x Made Up, hidden 7168" in line
    gate.write_reference(reference, others, slower("dispatch", 2))
    assert gate.compare(reference, others, slower("dispatch", 2), 0.1) == gate.Verdict([], [])
    assert gate.compare(reference, FACTS, RUN, 0.1) == gate.Verdict([], []), "the first host's figures are gone"


def test_an_empty_reference_is_told(tmp_path: Path) -> None:
    (tmp_path / "reference.json").write_text("{}\n")
    (line,) = gate.compare(tmp_path / "reference.json", FACTS, RUN, 0.1).failures
    assert "but of no host at all. There, make bench-reference adds it." in line


def test_committed_reference() -> None:
    """Whatever hosts it has, each has all that `make bench-check` measures."""
    for host, kept in json.loads((ROOT / "benchmarks" / "reference.json").read_text()).items():
        assert gate.host_of(kept["measured"]) == host
        shapes = {f"{tokens} tokens, eager, {sms} SMs" for tokens in ep.GATED["prefill"] for sms in ep.GATED["sms"]}
        for mode in MODES:
            shapes |= {f"{n} tokens, {mode}, {sms} SMs" for n in ep.GATED["decode"] for sms in ep.GATED["decode_sms"]}
        names = {name for name, call in CALLS.items() if call.captures}
        assert kept["times_floor"].keys() == names | {"barrier"}
        assert all(kept["times_floor"][name].keys() == shapes for name in names)


# The model of SMs


def sweep(times: dict[int, float], **changes: Any) -> list[list[Reading]]:
    return [both(reading(median, sms=sms, **changes)) for sms, median in times.items()]


def told(sms: dict[str, int]) -> Callable[[str, int], int]:
    """Choices by the name of a call, for any number of tokens."""
    return lambda name, tokens: sms[name]


def test_model_within_a_sweep() -> None:
    flat = {8: 300.0, 16: 170.0, 22: 120.0, 24: 118.0, 48: 116.0}
    verdict = gate.check_model([*sweep(flat), *RUN[2:]], told({"dispatch": 22, "combine": 4, "barrier": 1}), 0.05)
    assert verdict.failures == []
    assert verdict.notes == [
        "dispatch | 4096 tokens, eager: 121.2 us with the model's 22 SMs, 3% above the best of the sweep (117.2 with "
        "48); 22 are enough; where SMs are the limit about 40 us + 2101 SM-us / SMs"
    ]


def test_model_outside_of_a_sweep() -> None:
    """Too few SMs fail, and so do too many where more are slower; each call and batch is judged by itself."""
    steep, hump = {16: 176.0, 22: 140.0, 32: 115.0, 48: 112.0}, {16: 95.0, 22: 120.0, 32: 130.0, 48: 140.0}
    verdict = gate.check_model([*sweep(steep), *sweep(hump, tokens=128)], told({"dispatch": 22}), 0.05)
    assert [line.split(":")[0] for line in verdict.failures] == [
        "dispatch | 4096 tokens, eager",
        "dispatch | 128 tokens, eager",
    ]
    assert "25% above the best of the sweep (113.1 with 48); 32 are enough" in verdict.failures[0]
    assert verdict.doubtful == {1, 2, 3, 4, 5}, "the choices, and all that are better than they may be"


def test_each_call_has_its_own_choice() -> None:
    steep = {16: 176.0, 22: 140.0, 32: 115.0, 48: 112.0}
    run = [*sweep(steep), *sweep(steep, name="combine")]
    verdict = gate.check_model(run, told({"dispatch": 32, "combine": 22}), 0.05)
    assert [line.split(":")[0] for line in verdict.failures] == ["combine | 4096 tokens, eager"]
    assert [line.split(":")[0] for line in verdict.notes] == ["dispatch | 4096 tokens, eager"]


def test_fit() -> None:
    """Only where the link is not the limit."""
    times = {sms: max(35 + 2256 / sms, 112) for sms in (8, 16, 24, 32, 48, 96)}
    assert gate.fit(times) == "; where SMs are the limit about 35 us + 2256 SM-us / SMs"
    assert gate.fit({16: 130.0, 24: 112.0, 48: 111.0}) == ""


def test_model_that_was_not_measured() -> None:
    (line,) = gate.check_model(sweep({16: 176.0, 24: 150.0}), told({"dispatch": 22}), 0.05).failures
    assert "the model's 22 SMs are not in the sweep" in line
    (line,) = gate.check_model(RUN[2:], told({"dispatch": 22, "combine": 22}), 0.05).failures
    assert "nothing was swept" in line


# Readings


def test_reading() -> None:
    one = reading()
    assert (one.gbs, one.ratio, one.sm_us) == (240.0, pytest.approx(2 / 3), 3600.0)
    assert replace(one, kernels=(30.0, 100.0)).sm_us == 24 * 130, "SMs are held by kernels, not by the host's pauses"


def test_floor_is_a_meeting_and_the_bytes() -> None:
    assert CEILINGS.floor_us(36_000_000, "eager") == 106
    assert CEILINGS.floor_us(0, "graph") == 4


def test_kernels_of_a_call() -> None:
    """In the order of launches, whatever else runs; none where some are missing."""
    seen = []
    for call in range(3):
        start = 1000.0 * call
        seen += [("Memset (Device)", start, 90.0), ("ncclDevKernel_AllReduce", start + 100, 9.0)]
        seen += [("deep_ep_dispatch", start + 110, 30.0 + call), ("deep_ep_dispatch", start + 150, 80.0 - call)]
    assert kernel_times(seen[::-1], 3) == [31.0, 79.0]
    assert kernel_times(seen[:-1], 3) == []
    assert kernel_times([], 3) == []


def test_panels() -> None:
    """A batch that was swept is shown against SMs, all others against tokens; the barrier is no batch."""
    decode = [reading(20.0, tokens=tokens, mode=mode) for tokens in (1, 128) for mode in MODES]
    swept = [reading(sms=sms, tokens=8192) for sms in (16, 24)]
    panels = panels_of([*swept, *decode, RUN[-1][0]])
    assert [(title, along, len(found)) for title, along, found in panels] == [
        ("8192 tokens a rank, eager", "sms", 2),
        ("24 SMs, eager", "tokens", 2),
        ("24 SMs, graph", "tokens", 2),
    ]


# The whole, on a machine that launches nothing


class MadeUpTimes:
    """A stopwatch. Twice as many SMs are twice as fast."""

    def __init__(self) -> None:
        self.factor = 1.0

    def times(self, mode: str, call: Callable[[], Any], iterations: int) -> list[float]:
        sms = call() or 1
        return [self.factor * (1 + i / 100) * 100 / sms for i in range(iterations)]

    def host(self, call: Callable[[], Any]) -> float:
        return 50.0

    def kernels(self, mode: str, call: Callable[[], Any]) -> list[float]:
        return [1.0, 2.0]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that say with how many SMs they were made."""
    for name, call in CALLS.items():
        monkeypatch.setitem(CALLS, name, replace(call, prepare=lambda workload, sms: lambda: sms))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Made Up")
    monkeypatch.setattr(ep, "barrier", lambda buffer: None)


def run(buffer: ElasticBuffer, *options: str, stopwatch: Any = None) -> tuple[Report, bool]:
    bench = ep.Bench(ep.parse([*SMALL, *options]), buffer, stopwatch or MadeUpTimes(), CEILINGS, torch.device("cpu"))
    return bench.report, bench.run()


def test_a_whole_run(calls: None, buffer: ElasticBuffer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every call, shape and mode, in the table, the JSON and the plot."""
    report, failed = run(buffer, "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png"))
    assert not failed
    captured = sum(call.captures for call in CALLS.values())
    num_readings = 2 + len(CALLS) * (2 * len(ep.USUAL["sms"]) + 2) + 2 * captured
    assert len(report.readings) == num_readings
    assert all(each[0].kernels == (1.0, 2.0) for each in report.readings)
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["facts"] == report.facts
    assert len(written["readings"]) == num_readings
    wanted = {"median", "low", "high", "kernels", "sm_us", "link_bytes", "gbs", "ratio", "times_floor", "host"}
    assert wanted <= written["readings"][0].keys()
    assert (tmp_path / "a.png").stat().st_size > 10_000
    read = Report.read(tmp_path / "a.json")
    assert (read.title, read.facts, read.readings) == (report.title, report.facts, report.readings)
    shown = capsys.readouterr().out
    assert "…" not in shown, "the table is cut off"
    for column in ("end to end", "kernels", "SM-us", "MB", "GB/s", "of link", "x floor", "host"):
        assert column in shown


def test_a_plot_of_what_another_host_has_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = Report("2 x Made Up", FACTS)
    written.readings = RUN
    written.write_json(tmp_path / "a.json")
    monkeypatch.setattr("sys.argv", ["benchmarks.report", str(tmp_path / "a.json"), str(tmp_path / "a.png")])
    reports.main()
    assert Report.read(tmp_path / "a.json").readings == RUN
    assert (tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.parametrize("ranks", [2, 8])
def test_the_table_is_wide_enough(ranks: int, buffer: ElasticBuffer) -> None:
    from rich.console import Console

    report = Report("8 x Made Up", FACTS)
    long = reading(1503.8, name="dispatch, cached expanded", sms=132, tokens=8192, kernels=(1001.1, 500.2))
    report.readings = [[replace(long, rank=rank) for rank in range(ranks)]]
    Console(file=(out := io.StringIO()), width=178).print(report.table())
    assert "dispatch, cached expanded" in out.getvalue()
    assert "1001.1 + 500.2" in out.getvalue()
    assert "…" not in out.getvalue()


def test_the_gate_by_its_options(
    calls: None, buffer: ElasticBuffer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sizes of their own, no call that waits for the host's CPU; a run written is a run that passes."""
    path, stopwatch = str(tmp_path / "reference.json"), MadeUpTimes()
    report, failed = run(buffer, "--write-reference", path, stopwatch=stopwatch)
    assert not failed
    assert "dispatch, CPU sync" not in gate.figures_of(report.readings)
    assert len(gate.figures_of(report.readings)["combine"]) == 2 * len(ep.GATED["sms"]) + 2 * 2
    assert run(buffer, "--reference", path, stopwatch=stopwatch)[1] is False
    assert run(buffer, "--reference", path, "--calls", "combine", stopwatch=stopwatch)[1] is False
    assert "up to 10% slower: OK" in capsys.readouterr().out
    stopwatch.factor = 1.2
    assert run(buffer, "--reference", path, stopwatch=stopwatch)[1] is True
    assert "FAILED combine | 8 tokens, eager, 24 SMs" in capsys.readouterr().out
    assert run(buffer, "--reference", path, "--tolerance", "0.25", stopwatch=stopwatch)[1] is False


class Disturbed(MadeUpTimes):
    """Something else keeps the host busy while the calls of some numbers are timed."""

    def __init__(self, disturbed: range, factor: float) -> None:
        super().__init__()
        self.disturbed, self.slower, self.num_timed = disturbed, factor, 0

    def times(self, mode: str, call: Callable[[], Any], iterations: int) -> list[float]:
        self.factor = self.slower if self.num_timed in self.disturbed else 1.0
        self.num_timed += 1
        return super().times(mode, call, iterations)


def test_what_fails_is_looked_at_again(
    calls: None, buffer: ElasticBuffer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing else: noise that has gone fails nothing, and noise that has come hides nothing."""
    path = str(tmp_path / "reference.json")
    quiet, _ = run(buffer, "--write-reference", path)
    assert "second look" not in capsys.readouterr().out, "nothing can fail"
    num_readings = len(quiet.readings)
    noisy = Disturbed(range(3, 5), 1.5)
    report, failed = run(buffer, "--reference", path, stopwatch=noisy)
    assert not failed
    assert f"A second look at 2 of {num_readings} readings:\n" in capsys.readouterr().out
    assert noisy.num_timed == num_readings + 2 * ep.SECOND_LOOKS
    assert gate.figures_of(report.readings) == gate.figures_of(quiet.readings)
    slow = Disturbed(range(3, 10_000), 1.5)
    report, failed = run(buffer, "--reference", path, stopwatch=slow)
    assert failed
    assert slow.num_timed == num_readings + (num_readings - 3) * ep.SECOND_LOOKS


def test_the_model_by_its_option(calls: None, buffer: ElasticBuffer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(buffer, "--check-model")[1] is True
    assert "FAILED combine | 8 tokens, eager: " in capsys.readouterr().out
    assert run(buffer, "--check-model", "--sms", "3", "--decode-sms", "2,1")[1] is False  # 4 SMs are the model's here
    assert "OK\n  dispatch | 8 tokens, eager: 25.2 us with the model's 4 SMs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--json", "nowhere/a.json"], "is no folder"),
        (["--reference", "nowhere.json"], "nowhere.json is not there; --write-reference makes it"),
        (["--sms", "24,0"], "invalid numbers value"),
        (["--iterations", "1"], "one reading has no spread"),
        (["--prefill", "", "--trace", "a.json"], "--prefill must not be empty"),
        (["--write-reference", "a.json", "--calls", "combine"], "--calls must not leave any out"),
        (["--prefill", "", "--decode", ""], "--prefill must not be empty"),
    ],
)
def test_what_is_refused(options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ep.parse(options)
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("module", [ep, roles])
def test_without_ranks(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("sys.argv", [module.__name__])
    with pytest.raises(
        SystemExit, match=f"{module.__name__} needs GPUs, and a rank for each: torchrun .* {module.__name__}"
    ):
        module.main()


def test_usual_sizes_are_those_of_the_issue() -> None:
    assert ep.parse([]).prefill == [4096, 8192]
    assert (min(ep.USUAL["decode"]), max(ep.USUAL["decode"])) == (1, 256)
    assert ep.parse(["--check-model", "--decode", ""]).sms == [8, 16, 24, 32, 48, 64, 96]
    assert ep.parse(["--reference", str(ROOT / "benchmarks" / "reference.json")]).sms == ep.GATED["sms"]


@pytest.mark.parametrize("target", ["bench", "bench-check", "bench-reference", "bench-model"])
def test_make_starts_it(target: str) -> None:
    recipe = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = (line for line in recipe.splitlines() if " -m benchmarks.ep" in line)
    ep.parse(line.partition(" -m benchmarks.ep")[2].split())


@pytest.mark.parametrize("way", sm.WAYS, ids=lambda way: way.name)
def test_what_an_sm_moves_compiles(way: sm.Way) -> None:
    """And spills nothing, or its figures would be of something else."""
    resources = sm.compiled(way, "sm_90a").resources
    assert resources is not None
    assert not resources.uses_local_memory


def test_what_an_sm_moves_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["benchmarks.sm"])
    with pytest.raises(SystemExit, match="needs a GPU"):
        sm.main()
