"""What benchmarks must not get worse than: what is compared, with what, and what comes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ep, gate
from benchmarks.report import Reading
from benchmarks.timing import MODES
from benchmarks.workload import CALLS
from tests.unit.made_up import FACTS, RUN, both, reading

ROOT = Path(__file__).resolve().parents[2]


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
    nothing = gate.compare(reference, FACTS, [], 0.1, calls="dispatch, in")
    assert nothing.failures == ["nothing was measured of dispatch, in"]
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


def test_a_full_disk_costs_no_reference(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, text: str) -> int:
        with path.open("w") as file:
            file.write(text[:100])
        raise OSError(28, "No space left on device")

    before = reference.read_text()
    monkeypatch.setattr(Path, "write_text", write)
    with pytest.raises(OSError, match="No space left"):
        gate.write_reference(reference, {**FACTS, "device": "Another"}, RUN)
    assert reference.read_text() == before
    assert list(reference.parent.iterdir()) == [reference]


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


@pytest.mark.parametrize(
    "content", ["", "[]", "{'a': 1}", '{"a": {"measured": {}}}', '{"a": {"measured": {}, "times_floor": []}}', None]
)
def test_what_is_no_reference(content: str | None, tmp_path: Path) -> None:
    """None: a folder."""
    path = tmp_path if content is None else tmp_path / "reference.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=rf"{path} is no reference of benchmarks.ep \("):
        gate.hosts_in(path)


# The model of SMs


def sweep(times: dict[int, float], **changes: Any) -> list[list[Reading]]:
    return [both(reading(median, sms=sms, **changes)) for sms, median in times.items()]


def told(sms: dict[str, int]) -> Callable[[str, int], int]:
    """Choices by the name of a call, for any number of tokens."""
    return lambda name, tokens: sms[name]


def test_model_within_a_sweep() -> None:
    flat = {8: 300.0, 16: 170.0, 22: 120.0, 24: 118.0, 48: 116.0}
    verdict = gate.check_model([*sweep(flat), *RUN[2:]], told({"dispatch": 22, "combine": 4, "barrier": 1}), 0.05)
    assert (verdict.failures, verdict.doubtful) == ([], set())
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
