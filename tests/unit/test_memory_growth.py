"""What the worker's --check-memory notices."""

from __future__ import annotations

import pytest
import torch

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
