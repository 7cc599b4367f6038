"""All that may be chosen for a round trip: arguments of dispatch, combine and the buffer, and what tokens do.

One space, drawn from in two ways: at random (Case.draw), and so that any two choices meet (Case.covering).
"""

from __future__ import annotations

import random
from typing import Any

from tests.elastic.covering import Parameter, Row, Space
from tests.elastic.timings import EMPTY, GIVEN

ANY = "any"  # the seed says
LONGEST = "longest"
SOME_EVENT = (None, GIVEN, EMPTY)
YES_OR_NO = (False, True)
QUANTISED: dict[str, Any] = {"owner": "scales", "owner_values": ("float32", "int32")}

SPACE: Space = {
    # The buffer, and what all its calls have in common.
    "buffer": Parameter(("settings", "bytes")),
    "num_qps": Parameter((0, 2)),
    # Who sends what to whom.
    "tokens": Parameter((ANY, "most", "one", "uneven", "none"), dull=("none",)),
    "num_topk": Parameter((8, 1, 2, 3, 13, 32)),
    "local_experts": Parameter((4, 1, 2, 3, 8, 32)),
    "kind": Parameter(("random", "holes", "skewed", "twice", "outside", "masked"), dull=("masked",)),
    "by_columns": Parameter(YES_OR_NO),
    "alignment": Parameter((None, 1, 3, 8, 16, 128)),
    "spare_tokens": Parameter((0, 5, None)),
    "do_cpu_sync": Parameter((None, True, False)),
    "do_handle_copy": Parameter((True, False)),
    "num_sms": Parameter((0, 1, 2, 3, 5, 24)),
    # The dispatch, with an earlier one's handle or without.
    "handle": Parameter((None, "plain", "expanded")),
    "repeats_handle": Parameter(YES_OR_NO, owner="handle", owner_values=("plain", "expanded")),
    "scales": Parameter((None, "float32", "int32")),
    "num_scales": Parameter((ANY, 1, 4, 100), **QUANTISED),
    "scale_strides": Parameter(("rows", "columns", "gaps"), **QUANTISED),
    "col_major_scales": Parameter(YES_OR_NO, **QUANTISED),
    "row_units": Parameter((ANY, 1, 3, 17, LONGEST)),  # of 16 bytes
    "row_gaps": Parameter(YES_OR_NO),
    "layout": Parameter(((False, False), (True, True), (True, False), (False, True))),  # do_expand, do_zero_padding
    "zero_copy": Parameter(YES_OR_NO, owner="buffer", owner_values=("settings",)),
    "with_weights": Parameter((True, False)),
    "with_stats": Parameter(YES_OR_NO),
    "previous_event": Parameter(SOME_EVENT),
    "before_epilogue": Parameter(SOME_EVENT),
    "asynchronous": Parameter(YES_OR_NO),
    "on_comm_stream": Parameter(YES_OR_NO),
    # The combine.
    "returned": Parameter(((False, True), (True, True), (True, False), (False, False))),  # expanded, multiple_reduction
    "returned_units": Parameter((ANY, 1, 3, 17, LONGEST)),
    "returned_gaps": Parameter(YES_OR_NO),
    "returned_weights": Parameter((True, False)),
    "returned_zero_copy": Parameter(YES_OR_NO, owner="returned", owner_values=((False, True), (False, False))),
    "num_biases": Parameter((0, 1, 2)),
    "returning_sms": Parameter((0, 1, 4)),
    "returning_previous_event": Parameter(SOME_EVENT),
    "returning_before_epilogue": Parameter(SOME_EVENT),
    "returning_asynchronous": Parameter(YES_OR_NO),
    "returning_on_comm_stream": Parameter(YES_OR_NO),
}


def draw(r: random.Random) -> Row:
    """Ordinary values as often as all others together."""
    row: Row = {}
    for name, parameter in SPACE.items():
        if parameter.applies(row):
            ordinary, *others = parameter.values
            row[name] = ordinary if r.random() < 0.5 else r.choice(others)
    return row


def tokens(chosen: str, r: random.Random, num_ranks: int, largest: int) -> tuple[int, ...]:
    """Of each rank."""
    if chosen == ANY:
        drawn = tuple(r.choice([0, 1, r.randint(0, 8), r.randint(0, largest)]) for _ in range(num_ranks))
        return drawn if any(drawn) else (largest,) * num_ranks
    if chosen == "uneven":  # every other rank has none at all
        return tuple(largest * ((rank + 1) % 2) for rank in range(num_ranks))
    return ({"none": 0, "one": 1, "most": largest}[chosen],) * num_ranks


def hidden(units: Any, r: random.Random, values_of_unit: int, longest: int) -> int:
    """Values of a row."""
    most = longest // values_of_unit
    return values_of_unit * min(most, {ANY: r.randint(1, 64), LONGEST: most}.get(units, units))
