"""Readings of all ranks: a table on the terminal, JSON, a plot, and a comparison with earlier ones."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Reading:
    """One call, as one rank saw it. Times in microseconds."""

    name: str
    tokens: int
    mode: str  # eager or graph
    sms: int
    rank: int
    median: float
    low: float  # quartiles
    high: float
    link_bytes: int
    ceiling: float  # of the time: what these bytes take at the link's ceiling
    host: float

    @property
    def gbs(self) -> float:
        return self.link_bytes / self.median / 1e3

    @property
    def ratio(self) -> float:
        """Part of the link's ceiling that the whole call reaches."""
        return self.ceiling / self.median

    @property
    def key(self) -> str:
        return f"{self.name} | {self.tokens} tokens | {self.mode} | {self.sms} SMs"

    @staticmethod
    def of(times: list[float], **known: Any) -> Reading:
        low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        return Reading(median=median, low=low, high=high, **known)


class Report:
    """Collective over all ranks; rank 0 writes."""

    def __init__(self, title: str, facts: dict[str, Any]) -> None:
        self.title, self.facts = title, facts
        self.readings: list[list[Reading]] = []  # of all ranks each

    def add(self, mine: Reading) -> None:
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        self.readings.append(everyone)
        if dist.get_rank() == 0:  # a run that is cut off has said what it saw
            print(f"{mine.key}: {' / '.join(f'{each.median:.1f}' for each in everyone)} us", flush=True)

    def print(self) -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table(
            title=self.title, caption="median (quartiles) of all ranks, in microseconds", title_justify="left"
        )
        for column in ("call", "tokens", "mode", "SMs", "end to end", "SM-us", "GB/s", "of ceiling", "host"):
            table.add_column(column, justify="left" if column in ("call", "mode") else "right", no_wrap=True)
        for each in self.readings:
            first = each[0]
            table.add_row(
                first.name,
                str(first.tokens),
                first.mode,
                str(first.sms),
                " / ".join(f"{r.median:.1f} ({r.low:.1f}-{r.high:.1f})" for r in each),
                f"{max(r.median for r in each) * first.sms:,.0f}",
                f"{min(r.gbs for r in each):.0f}",
                f"{min(r.ratio for r in each):.0%}",
                f"{max(r.host for r in each):.0f}",
            )
        Console(width=150).print(table)

    def write_json(self, path: Path) -> None:
        readings = [asdict(reading) for each in self.readings for reading in each]
        path.write_text(json.dumps({"facts": self.facts, "readings": readings}, indent=1))

    def write_plot(self, path: Path) -> None:
        """Time against SMs, a line a call, with the link's ceiling; one panel for each number of tokens."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        slowest = [max(each, key=lambda reading: reading.median) for each in self.readings]
        panels = sorted({(r.tokens, r.mode) for r in slowest})
        figure, axes = pyplot.subplots(1, len(panels), figsize=(1 + 5 * len(panels), 5), squeeze=False)
        for axis, (tokens, mode) in zip(axes[0], panels, strict=True):
            here = [r for r in slowest if (r.tokens, r.mode) == (tokens, mode)]
            for i, name in enumerate(dict.fromkeys(r.name for r in here)):
                line = sorted((r for r in here if r.name == name), key=lambda r: r.sms)
                sms = [r.sms for r in line]
                axis.plot(sms, [r.median for r in line], marker="o", color=f"C{i}", label=name)
                axis.plot(sms, [r.ceiling for r in line], linestyle=":", color=f"C{i}")
            axis.set(
                title=f"{tokens} tokens a rank, {mode}", xlabel="SMs, all in", ylabel="microseconds", ylim=(0, None)
            )
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
        figure.suptitle(f"{self.title}; dotted: the link's ceiling")
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)


def drifted(path: Path, reference: Path, tolerance: float) -> list[str]:
    """Readings whose ratio to the ceiling is worse than in ``reference`` by more than ``tolerance``, in words.

    Both files are what Report.write_json writes. A reading that only the reference has counts too.
    """

    def ratios(file: Path) -> dict[str, float]:
        worst: dict[str, float] = {}
        for fields in json.loads(file.read_text())["readings"]:
            reading = Reading(**fields)
            worst[reading.key] = min(reading.ratio, worst.get(reading.key, reading.ratio))
        return worst

    now, found = ratios(path), []
    for key, before in ratios(reference).items():
        if key not in now:
            found.append(f"{key}: not measured; the reference has {before:.1%} of the ceiling")
        elif now[key] < before * (1 - tolerance):
            found.append(f"{key}: {now[key]:.1%} of the ceiling, {before:.1%} in the reference")
    return found
