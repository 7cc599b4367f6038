"""Readings of all ranks: a table on the terminal, JSON, a plot.

A host that has no matplotlib writes JSON (``--json``), and another one draws it:

    python -m benchmarks.report bench.json bench.png
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

WIDTH = 178  # columns of the table
PICTURES = (".png", ".pdf", ".svg")
CAPTION = """\
Microseconds. End to end: median (quartiles) of each rank, or of the slowest of many; all else: of the worst rank.
Kernels: of this package, by the profiler. SM-us: SMs x time that kernels hold them. MB: sent over the link by one rank.
Of link: part of its ceiling. x floor: end to end, over a barrier and those bytes at the ceiling.
Host: of the CPU; of the same call, asynchronous."""
SECOND = "\n*: timed again, by turns; the least disturbed of several looks."


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
    floor: float  # a barrier and that (ceilings.py)
    host: float | None  # a graph's replay is not the host's work
    host_async: float | None = None  # of the same call with async_with_compute_stream
    kernels: tuple[float, ...] = ()  # of this package, in the order of their launches; none: not looked at
    is_second: bool = False  # look, with times of its own; the host's are of the first one

    @property
    def gbs(self) -> float:
        return self.link_bytes / self.median / 1e3

    @property
    def ratio(self) -> float:
        """Part of the link's ceiling that the whole call reaches."""
        return self.ceiling / self.median

    @property
    def times_floor(self) -> float:
        return self.median / self.floor

    @property
    def sm_us(self) -> float:
        """SM-microseconds: SMs, times how long kernels hold them, waiting included. Where kernels were not looked at
        the whole call counts, which is a little more."""
        return self.sms * (sum(self.kernels) or self.median)

    @property
    def shape(self) -> str:
        return f"{self.tokens} tokens, {self.mode}, {self.sms} SMs" if self.tokens else self.mode

    @staticmethod
    def of(times: list[float], **known: Any) -> Reading:
        return Reading(**spread_of(times), **known)

    def again(self, times: list[float]) -> Reading:
        """The same call, by a second look."""
        return replace(self, **spread_of(times), is_second=True)


def spread_of(times: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {"median": median, "low": low, "high": high}


def slowest(everyone: list[Reading]) -> Reading:
    """The rank that a layer waits for."""
    return max(everyone, key=lambda reading: reading.median)


class Report:
    """Collective over all ranks; rank 0 writes."""

    def __init__(self, title: str, facts: dict[str, Any]) -> None:
        self.title, self.facts = title, facts
        self.readings: list[list[Reading]] = []  # of all ranks each

    def add(self, mine: Reading) -> None:
        self.readings.append(gathered(mine))
        tell(self.readings[-1])

    def look_again(self, idx: int, turns: list[list[float]]) -> None:
        """Second looks at the call that was added as number ``idx``, one a turn. The one that was disturbed least
        counts: whatever else a host does makes calls slower, never faster."""
        first = self.readings[idx][dist.get_rank()]
        of_ranks = gathered([first.again(times) for times in turns])
        self.readings[idx] = min((list(each) for each in zip(*of_ranks, strict=True)), key=lambda r: slowest(r).median)
        tell(self.readings[idx])

    def add_kernels(self, idx: int, mine: list[float]) -> None:
        """Of the call that was added as number ``idx``."""
        ranks = zip(self.readings[idx], gathered(tuple(mine)), strict=True)
        self.readings[idx] = [replace(reading, kernels=kernels) for reading, kernels in ranks]

    def print(self) -> None:
        from rich.console import Console

        Console(width=WIDTH).print(self.table())

    def table(self) -> Any:
        from rich.table import Table

        is_second = any(reading.is_second for each in self.readings for reading in each)
        table = Table(
            title=self.title,
            caption=CAPTION + SECOND * is_second,
            title_justify="left",
            caption_justify="left",
        )
        columns = "call, tokens, mode, SMs, end to end, kernels, SM-us, MB, GB/s, of link, x floor, host"
        for column in columns.split(", "):
            table.add_column(column, justify="left" if column in ("call", "mode") else "right", no_wrap=True)
        for each in self.readings:
            table.add_row(*cells(each))
        return table

    def write_json(self, path: Path) -> None:
        """Readings with what follows from them, so that nobody has to work it out again."""
        readings = [
            {**asdict(r), "gbs": r.gbs, "ratio": r.ratio, "times_floor": r.times_floor, "sm_us": r.sm_us}
            for each in self.readings
            for r in each
        ]
        found = {"title": self.title, "facts": self.facts, "readings": readings}
        path.write_text(json.dumps(found, indent=1))

    @classmethod
    def read(cls, path: Path) -> Report:
        """What ``write_json`` wrote.

        Raises:
            ValueError: naming the file, if it is something else.
        """
        known = {field.name for field in fields(Reading)}
        try:
            found = json.loads(path.read_text())
            report = cls(found["title"], found["facts"])
            for values in found["readings"]:
                reading = Reading(**{name: value for name, value in values.items() if name in known})
                reading = replace(reading, kernels=tuple(reading.kernels))
                if reading.rank == 0:
                    report.readings.append([])
                report.readings[-1].append(reading)
        except (OSError, ValueError, AttributeError, TypeError, LookupError) as error:
            raise ValueError(
                f"{path} is not what --json of benchmarks.ep writes ({type(error).__name__}: {error})"
            ) from None
        for each in report.readings:
            if len(each) != found["facts"]["ranks"] or len({(reading.name, reading.shape) for reading in each}) > 1:
                raise ValueError(f"{path} lacks readings of some ranks, from {each[0].name} | {each[0].shape} on")
        return report

    def write_plot(self, path: Path) -> None:
        """Time against SMs where there are several, else against tokens; a line a call, its floor dotted.

        Raises:
            ValueError: there is nothing to draw.
        """
        panels = panels_of([slowest(each) for each in self.readings])
        if not panels:
            raise ValueError("nothing was measured that has a number of tokens, so there is nothing to draw")

        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        names = list(dict.fromkeys(r.name for _, _, found in panels for r in found))
        figure, axes = pyplot.subplots(
            1, len(panels), figsize=(1 + 5 * len(panels), 6), squeeze=False, layout="constrained"
        )
        for axis, (title, along, readings) in zip(axes[0], panels, strict=True):
            for i, name in enumerate(names):
                line = sorted((r for r in readings if r.name == name), key=lambda r: getattr(r, along))
                x = [getattr(r, along) for r in line]
                axis.plot(x, [r.median for r in line], marker="o", color=f"C{i}", label=name)
                axis.plot(x, [r.floor for r in line], linestyle=":", color=f"C{i}")
            ticks = sorted({getattr(r, along) for r in readings})
            if along == "tokens":
                axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, labels=[str(tick) for tick in ticks], rotation="vertical")
            axis.set(title=title, xlabel={"sms": "SMs, all in", "tokens": "tokens a rank"}[along], ylim=(0, None))
            axis.grid(alpha=0.3)
        axes[0][0].set_ylabel("microseconds, end to end")
        figure.suptitle(f"{self.title}; dotted: the floor")
        # Above no line, and one for all panels.
        lines = [pyplot.Line2D([], [], marker="o", color=f"C{i}", label=name) for i, name in enumerate(names)]
        figure.legend(handles=lines, loc="outside lower center", ncols=2 * len(panels))
        figure.savefig(path, dpi=120)
        pyplot.close(figure)


def writable(text: str) -> Path:
    """A file that can be written: better told now than after minutes."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder")
    if not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.resolve().parent} is no folder")
    return path


def drawable(text: str) -> Path:
    """One that a plot can be written to."""
    path = writable(text)
    if path.suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"{path} must end with one of {', '.join(PICTURES)}")
    return path


def gathered(mine: Any) -> list[Any]:
    """One of each rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def tell(everyone: list[Reading]) -> None:
    """On the terminal, once: a run that is cut off has said what it saw."""
    if dist.get_rank() == 0:
        medians = " / ".join(f"{each.median:.1f}" for each in everyone)
        print(f"{everyone[0].name} | {everyone[0].shape}: {medians} us", flush=True)


def hosts_of(everyone: list[Reading]) -> list[list[float]]:
    """Of the call, and of the same one if it is asynchronous, each rank's microseconds of the host, where measured."""
    kinds = ([r.host for r in everyone], [r.host_async for r in everyone])
    return [found for kind in kinds if (found := [time for time in kind if time is not None])]


def cells(everyone: list[Reading]) -> list[str]:
    """A row of the table."""
    first, worst = everyone[0], slowest(everyone)
    shown = everyone if len(everyone) <= 2 else [worst]
    crosses = first.link_bytes > 0
    return [
        first.name,
        str(first.tokens or "-"),
        first.mode,
        str(first.sms),
        " / ".join(f"{r.median:.1f} ({r.low:.1f}-{r.high:.1f})" for r in shown) + (" *" if first.is_second else ""),
        " + ".join(f"{took:.1f}" for took in max((r.kernels for r in everyone), key=sum)) or "-",
        f"{max(r.sm_us for r in everyone):,.0f}",
        f"{max(r.link_bytes for r in everyone) / 1e6:.1f}" if crosses else "-",
        f"{min(r.gbs for r in everyone):.0f}" if crosses else "-",
        f"{min(r.ratio for r in everyone):.0%}" if crosses else "-",
        f"{max(r.times_floor for r in everyone):.2f}",
        ", ".join(f"{max(times):.0f}" for times in hosts_of(everyone)) or "-",
    ]


def panels_of(readings: list[Reading]) -> list[tuple[str, str, list[Reading]]]:
    """(title, what the x axis is, readings): one panel for each batch that was swept over SMs, and one for each mode
    and number of SMs of all others."""
    panels: dict[tuple[str, str], list[Reading]] = {}
    for reading in readings:
        if reading.tokens == 0:
            continue
        swept = {r.sms for r in readings if (r.tokens, r.mode) == (reading.tokens, reading.mode)}
        if len(swept) > 1:
            key = f"{reading.tokens} tokens a rank, {reading.mode}", "sms"
        else:
            key = f"{reading.sms} SMs, {reading.mode}", "tokens"
        panels.setdefault(key, []).append(reading)
    return [(title, along, found) for (title, along), found in panels.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="what --json of benchmarks.ep has written")
    parser.add_argument("png", type=drawable, help="the picture to make of it")
    arguments = parser.parse_args()
    try:
        Report.read(arguments.json).write_plot(arguments.png)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
