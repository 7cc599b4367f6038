"""What may not get worse: calls against benchmarks/reference.json, and the choice of SMs against a sweep.

The reference holds, for each kind of host, how many times its floor each call takes: the floor is measured in the same
run (ceilings.py), so a figure says what our code makes of a host, and not which day or clock it was.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.report import Reading, slowest

HOW = "make bench-reference"

Figures = dict[str, dict[str, float]]
"""Call -> shape -> times the floor, of the rank that fares worst."""


@dataclass(frozen=True)
class Verdict:
    """What must be seen to, and what is worth knowing; in words."""

    failures: list[str]
    notes: list[str]
    doubtful: set[int] = field(default_factory=set)
    """Which readings failures come from. They are worth a second look: one reading may be a moment's noise."""


def host_of(facts: dict[str, Any]) -> str:
    """What figures depend on, beside our code: another such host makes others."""
    return f"{facts['ranks']} x {facts['device']}, hidden {facts['hidden']}, top-{facts['topk']} of {facts['experts']}"


def hosts_in(path: Path) -> dict[str, Any]:
    """What a reference holds.

    Raises:
        ValueError: the file is no reference.
    """
    try:
        hosts: dict[str, Any] = json.loads(path.read_text())
        for kept in hosts.values():
            kept["measured"].keys()
            for figures in kept["times_floor"].values():
                sum(figures.values())  # numbers by shape
    except (OSError, ValueError, AttributeError, TypeError, LookupError) as error:
        raise ValueError(f"{path} is no reference of benchmarks.ep ({type(error).__name__}: {error})") from None
    return hosts


def figures_of(readings: list[list[Reading]]) -> Figures:
    figures: Figures = {}
    for each in readings:
        worst = max(r.times_floor for r in each)
        figures.setdefault(each[0].name, {})[each[0].shape] = round(worst, 2)
    return figures


def write_reference(path: Path, facts: dict[str, Any], readings: list[list[Reading]]) -> None:
    """Put this run's figures in the place of those of the same kind of host; others stay."""
    hosts = hosts_in(path) if path.exists() else {}
    hosts[host_of(facts)] = {"measured": facts, "times_floor": figures_of(readings)}
    beside = path.with_name(f"{path.name}.new")  # a full disk must not cost what others have
    try:
        beside.write_text(json.dumps(hosts, indent=1, sort_keys=True) + "\n")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def compare(
    path: Path, facts: dict[str, Any], readings: list[list[Reading]], tolerance: float, calls: str = ""
) -> Verdict:
    """This run against the reference.

    Args:
        tolerance: by which part a figure may be above the one in the reference.
        calls: part of a name; what the reference has of other calls is not missed.
    """
    hosts, host = hosts_in(path), host_of(facts)
    if host not in hosts:
        known = "; ".join(hosts) or "no host at all"
        return Verdict([f"{path} has nothing of {host}, but of {known}. There, {HOW} adds it."], [])
    now, before = figures_of(readings), hosts[host]["times_floor"]
    failures: list[str] = []
    notes: list[str] = []
    doubtful: set[int] = set()
    for i, (name, shape) in enumerate((each[0].name, each[0].shape) for each in readings):
        value, reference = now[name][shape], before.get(name, {}).get(shape)
        line = f"{name} | {shape}: {value:.2f} x its floor"
        if reference is None:
            failures.append(f"{line}, but {path} lacks it; {HOW} adds it")
            continue
        line += f", {reference:.2f} in the reference ({value / reference - 1:+.0%})"
        if value > reference * (1 + tolerance):
            failures.append(line)
            doubtful.add(i)
        elif value < reference * (1 - tolerance):
            notes.append(f"{line}: better; {HOW} keeps it so")
    if not readings:
        failures.append(f"nothing was measured of {calls or 'all calls'}")
    for name in before:
        gone = [shape for shape in before[name] if shape not in now.get(name, {})]
        if calls in name:
            failures += [f"{name} | {shape}: not measured, but {path} has it" for shape in gone]
    return Verdict(failures, notes, doubtful)


def check_model(readings: list[list[Reading]], choose: Callable[[str, int], int], within: float) -> Verdict:
    """Whether the model's number of SMs is as good as the best of a sweep, for each call and batch that was swept.

    Args:
        choose: what the call of a name takes for so many tokens when it is told no number; parts of the sweep.
        within: by which part of the best time a choice may be slower.
    """
    sweeps: dict[tuple[str, int, str], dict[int, float]] = {}
    places: dict[tuple[str, int, str, int], int] = {}
    for i, each in enumerate(readings):
        worst = slowest(each)
        sweeps.setdefault((worst.name, worst.tokens, worst.mode), {})[worst.sms] = worst.median
        places[worst.name, worst.tokens, worst.mode, worst.sms] = i
    failures: list[str] = []
    notes: list[str] = []
    doubtful: set[int] = set()
    for (name, tokens, mode), times in sweeps.items():
        if len(times) == 1:
            continue
        what, choice = f"{name} | {tokens} tokens, {mode}", choose(name, tokens)
        if choice not in times:
            failures.append(f"{what}: the model's {choice} SMs are not in the sweep")
            continue
        best = min(times, key=lambda sms: times[sms])
        enough = min(sms for sms in times if times[sms] <= times[best] * (1 + within))
        slower = times[choice] / times[best] - 1
        line = (
            f"{what}: {times[choice]:.1f} us with the model's {choice} SMs, {slower:.0%} above the best of the sweep "
        )
        line += f"({times[best]:.1f} with {best}); {enough} are enough{fit(times)}"
        better = [sms for sms in times if times[choice] > times[sms] * (1 + within)]
        (failures if better else notes).append(line)
        doubtful.update(places[name, tokens, mode, sms] for sms in (choice, *better) if better)
    if not failures and not notes:
        failures.append("nothing was swept: --sms and --decode-sms need several numbers")
    return Verdict(failures, notes, doubtful)


def fit(times: dict[int, float]) -> str:
    """Fixed cost and work, by least squares over those numbers of SMs with which SMs are the limit, not the link."""
    slow = {1 / sms: time for sms, time in times.items() if time > 1.1 * min(times.values())}
    if len(slow) < 2:
        return ""
    work, fixed = statistics.linear_regression(list(slow), list(slow.values()))
    return f"; where SMs are the limit about {fixed:.0f} us + {work:.0f} SM-us / SMs"
