"""The benchmarks without a GPU: what they make of made-up times, what they refuse, what they compare."""

from __future__ import annotations

import io
import json
import re
import subprocess
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import ep, gate, roles, sm
from benchmarks import report as reports
from benchmarks.report import Report, panels_of
from benchmarks.timing import MODES, kernel_times
from benchmarks.workload import CALLS
from deep_ep import ElasticBuffer
from tests.unit.made_up import CEILINGS, FACTS, RUN, both, reading

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--hidden", "64", "--experts", "4", "--topk", "2", "--prefill", "8,16", "--decode", "1,4", "--iterations", "3"]


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to write to")
def test_a_full_disk(calls: None, buffer: ElasticBuffer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was measured is on the terminal, other files are written, and the run has failed."""
    plot = tmp_path / "a.png"
    assert run(buffer, "--calls", "combine", "--json", "/dev/full", "--plot", str(plot))[1] is True
    shown = capsys.readouterr().out
    assert "/dev/full was not written: [Errno 28] No space left on device" in shown
    assert "end to end" in shown
    assert plot.stat().st_size > 10_000


def test_no_plot_of_nothing(
    calls: None, buffer: ElasticBuffer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.png"
    assert run(buffer, "--calls", "barrier", "--no-kernels", "--plot", str(path))[1] is True
    assert f"{path} was not written: nothing was measured that has a number of tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "is not what --json of benchmarks.ep writes (FileNotFoundError: "),
        ("{", "is not what --json of benchmarks.ep writes (JSONDecodeError: "),
        ("[]", "is not what --json of benchmarks.ep writes (TypeError: "),
        ("{}", "is not what --json of benchmarks.ep writes (KeyError: 'title')"),
        ('{"title": "", "facts": {}, "readings": [1]}', "is not what --json of benchmarks.ep writes (AttributeError: "),
        (0, "is not what --json of benchmarks.ep writes (IndexError: "),
        (2, "lacks readings of some ranks, from dispatch | 4096 tokens, eager, 24 SMs on"),
        (-1, "lacks readings of some ranks, from barrier | graph on"),
    ],
)
def test_other_files_are_not_drawn(
    content: str | int | None, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number: what was written, without that reading."""
    path = tmp_path / "a.json"
    if isinstance(content, int):
        written = Report("2 x Made Up", FACTS)
        written.readings = RUN
        written.write_json(path)
        found = json.loads(path.read_text())
        del found["readings"][content]
        content = json.dumps(found)
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr("sys.argv", ["benchmarks.report", str(path), str(tmp_path / "a.png")])
    with pytest.raises(SystemExit, match=re.escape(complaint)):
        reports.main()


def test_what_is_missing_is_told_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"benchmarks.ep needs rich and matplotlib: pip install 'deep_ep\[examples\]'"):
        ep.require(["rich", "matplotlib"])


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

    def __init__(self, disturbed: Collection[int], factor: float) -> None:
        super().__init__()
        self.disturbed, self.slower, self.num_timed = disturbed, factor, 0

    def times(self, mode: str, call: Callable[[], Any], iterations: int) -> list[float]:
        self.factor = self.slower if self.num_timed in self.disturbed else 1.0
        self.num_timed += 1
        return super().times(mode, call, iterations)


@pytest.fixture
def kept(calls: None, buffer: ElasticBuffer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, Report]:
    """A reference, and the run that it was made of."""
    path = str(tmp_path / "reference.json")
    report, _ = run(buffer, "--write-reference", path)
    capsys.readouterr()
    return path, report


def test_what_fails_is_looked_at_again(
    buffer: ElasticBuffer, kept: tuple[str, Report], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing else: noise that has gone fails nothing, in the table it is told, and in the JSON."""
    (path, quiet), json_path = kept, tmp_path / "a.json"
    num_readings = len(quiet.readings)
    noisy = Disturbed([*range(3, 5), num_readings + 1, num_readings + 4], 1.5)  # of each call, one look in three, too
    report, failed = run(buffer, "--reference", path, "--json", str(json_path), stopwatch=noisy)
    assert not failed
    shown = capsys.readouterr().out
    assert f"A second look at 2 of {num_readings} readings:\n" in shown
    assert shown.count(" * ") == 2
    assert noisy.num_timed == num_readings + 2 * ep.SECOND_LOOKS
    assert gate.figures_of(report.readings) == gate.figures_of(quiet.readings)
    assert [i for i, each in enumerate(Report.read(json_path).readings) if each[0].is_second] == [3, 4]
    assert all(each[0].kernels == () for each in report.readings), "the profiler would disturb what comes after it"


def test_what_is_slow_stays_so(
    buffer: ElasticBuffer, kept: tuple[str, Report], capsys: pytest.CaptureFixture[str]
) -> None:
    path, quiet = kept
    num_readings = len(quiet.readings)
    slow = Disturbed([3, *range(num_readings, 10_000)], 1.5)
    assert run(buffer, "--reference", path, stopwatch=slow)[1] is True
    assert slow.num_timed == num_readings + ep.SECOND_LOOKS
    all_slow = Disturbed(range(10_000), 1.5)
    assert run(buffer, "--reference", path, stopwatch=all_slow)[1] is True
    assert all_slow.num_timed == num_readings
    assert f"{num_readings} readings to look at again: that is no noise" in capsys.readouterr().out


def test_a_reference_gets_second_looks_alone(buffer: ElasticBuffer, kept: tuple[str, Report], tmp_path: Path) -> None:
    path, other = kept[0], str(tmp_path / "other.json")
    num_readings = len(kept[1].readings)
    noisy = Disturbed([0, 3], 3.0)
    assert run(buffer, "--reference", path, "--write-reference", other, stopwatch=noisy)[1] is False
    assert noisy.num_timed == num_readings * (1 + ep.SECOND_LOOKS)
    assert json.loads(Path(other).read_text()) == json.loads(Path(path).read_text())


class Looks(MadeUpTimes):
    """Times by the number of SMs: of the first look, and of all later ones."""

    def __init__(self, of_sms: dict[int, tuple[float, float]]) -> None:
        super().__init__()
        self.of_sms, self.seen = of_sms, list[int]()

    def times(self, mode: str, call: Callable[[], Any], iterations: int) -> list[float]:
        sms = call()
        self.seen.append(sms)
        return [self.of_sms[sms][self.seen.count(sms) > 1]] * iterations


def test_second_looks_until_nothing_new_is_doubtful(calls: None, buffer: ElasticBuffer) -> None:
    """What the choice is compared with at the end has been looked at as often as the choice: 6 SMs were good enough
    beside its first look and are not beside its second."""
    looks = Looks({4: (106.0, 107.0), 5: (100.0, 103.0), 6: (101.5, 103.0), 8: (106.0, 106.0)})
    options = "--check-model", "--calls", "combine, in", "--prefill", "8", "--decode", "", "--sms", "4,5,6,8"
    report, failed = run(buffer, *options, stopwatch=looks)
    assert not failed
    assert looks.seen == [4, 5, 6, 8, *[4, 5] * ep.SECOND_LOOKS, *[6] * ep.SECOND_LOOKS]
    assert [each[0].is_second for each in report.readings] == [True, True, True, False]


def test_both_checks_at_once(buffer: ElasticBuffer, kept: tuple[str, Report]) -> None:
    """Each has second looks."""
    sms = "--sms", ",".join(map(str, ep.GATED["sms"]))
    options = "--reference", kept[0], "--check-model", *sms, "--tolerance", "9"
    bench = ep.Bench(ep.parse([*SMALL, *options]), buffer, MadeUpTimes(), CEILINGS, torch.device("cpu"))
    found = {"one": gate.Verdict(["bad"], [], {1}), "other": gate.Verdict(["bad"], [], {2})}
    bench.report.readings = RUN * 4
    assert bench.doubtful(found) == {1, 2}


def test_all_ranks_go_by_what_the_first_one_finds(
    calls: None, buffer: ElasticBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_both(mine: Any) -> list[Any]:
        return [found, mine] if isinstance(mine, dict) else [mine]

    found = {"the model": gate.Verdict(["too few SMs"], [])}
    for module in (ep, reports):
        monkeypatch.setattr(module, "gathered", of_both)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    assert run(buffer, "--no-kernels", "--prefill", "8", "--decode", "")[1] is True


def test_a_second_look_of_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three, the one counts in which the slowest rank was the fastest."""
    report = Report("2 x Made Up", FACTS)
    report.readings = [both(reading())]
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    calm, late = replace(RUN[0][0], median=125.0), replace(RUN[0][0], median=500.0)
    monkeypatch.setattr(reports, "gathered", lambda mine: [[late, calm, calm], mine])
    report.look_again(0, [[150.0, 151.0, 152.0], [120.0, 130.0, 140.0], [90.0, 900.0, 901.0]])
    first, second = report.readings[0]
    assert (first, second) == (calm, replace(RUN[0][1], low=120.0, median=130.0, high=140.0, is_second=True))


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
        (["--json", "."], ". is a folder"),
        (["--plot", "a.xyz"], "a.xyz must end with one of .png, .pdf, .svg"),
        (["--calls", "dispach"], "'dispach' is part of none of dispatch; dispatch, cached; "),
        (["--tolerance", "nan"], "invalid tolerance value: 'nan'"),
        (["--tolerance", "-1"], "invalid tolerance value: '-1'"),
        (["--repeat", "1"], "one run has nothing to differ from"),
        (["--repeat", "-3"], "one run has nothing to differ from"),
        (["--repeat", "9", "--check-model"], "time nothing that could be compared"),
        (["--trace", "a.json", "--write-reference", "a.json"], "time nothing that could be compared"),
        (["--check-model", "--write-reference", "a.json"], "make two runs"),
        (["--reference", __file__], "test_benchmarks.py is no reference of benchmarks.ep (JSONDecodeError: "),
        (["--write-reference", __file__], "test_benchmarks.py is no reference of benchmarks.ep (JSONDecodeError: "),
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
