"""The covering set of round trips: any two choices meet in it, and each of them reaches the calls."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from tests.elastic import cases, covering
from tests.elastic.choices import SPACE
from tests.elastic.covering import Parameter, Row


def unmet(rows: list[Row]) -> list[tuple[Any, ...]]:
    """Pairs of values, of parameters that may apply together, that no row holds, or only rows in which nothing happens
    that the pair could change."""
    result = []
    for (first, one), (second, other) in itertools.combinations(SPACE.items(), 2):
        for pair in itertools.product(one.values, other.values):
            if other.owner == first and pair[0] not in other.owner_values:
                continue
            wanted = {first: pair[0], second: pair[1]}.items()
            dull = {name: set(parameter.dull) for name, parameter in SPACE.items() if name not in (first, second)}
            if not any(
                wanted <= row.items() and not any(row.get(name) in values for name, values in dull.items())
                for row in rows
            ):
                result.append(tuple(wanted))
    return result


def test_any_two_choices_meet() -> None:
    rows = covering.rows(SPACE)
    assert unmet(rows) == []
    assert len(rows) < 110, "a greedy choice finds fewer"
    assert unmet(rows[:-1]), "every row brings a pair that none before it had"


def test_rows_are_whole_and_always_the_same() -> None:
    rows = covering.rows(SPACE)
    assert rows == covering.rows(SPACE)
    for row in rows:
        assert set(row) == {name for name, parameter in SPACE.items() if parameter.applies(row)}


@pytest.mark.parametrize(
    "breaking",
    [
        lambda shown: lambda space, row: itertools.combinations(row.items(), 2),  # whatever happens in the row
        lambda shown: lambda space, row: [*shown(space, row), *itertools.islice(covering.pairs(space), 5, 300, 7)],
    ],
    ids=["dull-rows-count", "some-are-crossed-out-early"],
)
def test_a_broken_generator_is_noticed(breaking: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covering, "shown", breaking(covering.shown))
    assert unmet(covering.rows(SPACE))


def test_every_choice_reaches_the_case() -> None:
    """Another value of any parameter makes another round trip."""
    rows = covering.rows(SPACE)
    for name, parameter in SPACE.items():
        row = next(row for row in rows if name in row and row["handle"] and row["scales"])
        if parameter.owner == "" and any(name == other.owner for other in SPACE.values()):
            continue  # others depend on it, so it cannot be changed alone
        drawn = {cases.Case.of({**row, name: value}, 0, 4, 24, 1024) for value in parameter.values}
        assert len(drawn) == len(parameter.values), f"values of {name} make the same case"
    plain = cases.Case.of(next(row for row in rows if not row["handle"] and not row["scales"]), 0, 4, 24, 1024)
    assert not plain.again
    assert plain.first.num_scales == 0


def test_dependent_parameters() -> None:
    space = {"a": Parameter((0, 1, 2)), "b": Parameter("xy", owner="a", owner_values=(1, 2)), "c": Parameter((0, 1))}
    rows = covering.rows(space)
    assert all(("b" in row) == (row["a"] != 0) for row in rows)
    assert {(row["a"], row.get("b")) for row in rows} == {(0, None), *itertools.product((1, 2), "xy")}
