"""Few rows in which any two values of any two parameters stand together.

Most mistakes need two settings to meet, seldom three. All of them together would be more calls than anybody can make;
a hundred rows hold every pair. Written here because hosts with GPUs can install nothing (scripts/gpu_host.sh).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]  # parameter -> value; one that does not apply is absent
Chosen = tuple[str, Any]  # a parameter and one of its values
Pair = tuple[Chosen, Chosen]


@dataclass(frozen=True)
class Parameter:
    """What may be chosen.

    Attributes:
        values: all of them; the first is the ordinary one.
        dull: those with which nothing happens that other parameters could change: a row shows nothing but their pairs.
        owner: a parameter that stands before this one, which applies only where the owner has one of ``owner_values``.
    """

    values: Sequence[Any]
    dull: Sequence[Any] = ()
    owner: str = ""
    owner_values: Sequence[Any] = ()

    def applies(self, row: Row) -> bool:
        return not self.owner or row[self.owner] in self.owner_values


Space = Mapping[str, Parameter]


def pairs(space: Space) -> Iterator[Pair]:
    """Every pair of values that can stand in one row."""
    for (first, of_first), (second, of_second) in itertools.combinations(space.items(), 2):
        for one, other in itertools.product(of_first.values, of_second.values):
            if of_second.owner != first or one in of_second.owner_values:
                yield (first, one), (second, other)


def shown(space: Space, row: Row) -> Iterator[Pair]:
    """The pairs that a row puts to the test."""
    dull = {(name, value) for name, value in row.items() if value in space[name].dull}
    return (pair for pair in itertools.combinations(row.items(), 2) if dull.issubset(pair))


def rows(space: Space) -> list[Row]:
    """Rows that show every pair; always the same ones. Earlier rows show more new pairs than later ones."""
    missing = dict.fromkeys(pairs(space))  # in order, which a set is not
    result = []
    while missing:
        row = _fill(space, dict(next(iter(missing))), missing)
        result.append(row)
        for pair in shown(space, row):
            missing.pop(pair, None)
    return result


def _fill(space: Space, wanted: Row, missing: Mapping[Pair, None]) -> Row:
    """A row with what is wanted, and elsewhere the values that show most missing pairs."""
    allowed = {
        name: [value for value in parameter.values if value not in parameter.dull] for name, parameter in space.items()
    }
    for name in wanted:
        if space[name].owner:
            allowed[space[name].owner] = list(space[name].owner_values)
    allowed |= {name: [value] for name, value in wanted.items()}
    row: Row = {}
    for name, parameter in space.items():
        if parameter.applies(row):
            # Those above, and of those below the wanted ones.
            others = (wanted | row).items()
            num_new = [sum(1 for _ in _new(name, value, others, missing)) for value in allowed[name]]
            row[name] = allowed[name][num_new.index(max(num_new))]
    return row


def _new(name: str, value: Any, others: Iterable[Chosen], missing: Mapping[Pair, None]) -> Iterator[Pair]:
    """Of the pairs with a value, those that are missing."""
    chosen = (name, value)
    return (pair for other in others for pair in ((other, chosen), (chosen, other)) if pair in missing)
