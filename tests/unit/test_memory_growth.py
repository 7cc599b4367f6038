"""What the worker's --check-memory notices."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.elastic import worker
from tests.elastic.memory import SPARE, Memory, check_growth


def test_kept_pages_are_noticed() -> None:
    before = Memory.now(torch.device("cpu"))
    check_growth(before, Memory.now(torch.device("cpu")), num_trips=1)
    kept = bytearray(b"x") * (2 * SPARE)
    with pytest.raises(AssertionError, match=r"1 round trips left .* bytes \(private\)"):
        check_growth(before, Memory.now(torch.device("cpu")), num_trips=1)
    assert kept


@pytest.mark.parametrize("name", ["private", "allocated", "device"])
def test_each_kind_counts(name: str) -> None:
    few, many = Memory(1 << 30, 1 << 30, 1 << 30), {"private": 1 << 30, "allocated": 1 << 30, "device": 1 << 30}
    check_growth(few, Memory(**{**many, name: (1 << 30) + SPARE}), num_trips=1)
    with pytest.raises(AssertionError, match=name):
        check_growth(few, Memory(**{**many, name: (1 << 30) + 2 * SPARE}), num_trips=1000)


@pytest.mark.parametrize(("num_trips", "before"), [(2, 1), (3, 1), (40, 20), (60, 30), (500, 30)])
def test_some_trips_are_always_looked_at(monkeypatch: pytest.MonkeyPatch, num_trips: int, before: int) -> None:
    """Those of the second half, at least."""

    def make_trips(picked: Iterator[Any], *_: Any) -> int:
        counts.append(len(list(picked)))
        return counts[-1]

    def agree(error: BaseException | None, *_: Any) -> list[str]:
        return [] if error is None else [str(error)]

    sizes, counts = iter([Memory(1 << 30), Memory(2 << 30)]), list[int]()
    monkeypatch.setattr(worker, "make_trips", make_trips)
    monkeypatch.setattr(worker.Memory, "now", lambda _: next(sizes))
    monkeypatch.setattr(worker.cases, "agree_on_failure", agree)
    group: Any = SimpleNamespace(rank=lambda: 0)
    picked: Any = iter([("", None)] * num_trips)
    assert worker.check_memory(picked, {}, torch.device("cpu"), group) is None, "what has grown is a failure"
    assert counts == [before, num_trips - before]


def test_too_few_trips_are_an_error() -> None:
    group: Any = SimpleNamespace(rank=lambda: 0)
    with pytest.raises(SystemExit, match="1 round trips say nothing about memory"):
        worker.check_memory(iter([("", None)]), {}, torch.device("cpu"), group)  # type: ignore[list-item]
