"""Conversions: every bfloat16, every e4m3, and floats chosen to be awkward, bit for bit on every machine."""

from __future__ import annotations

import numpy as np
import pytest

from tests.device import oracle
from tests.device.bench import Bench, Probe, Words


@pytest.fixture
def machine_without_race(machine: str) -> None:
    if machine == "race":
        pytest.skip("conversions touch no memory that another thread could")


def run(bench: Bench, variant: int, values: Words) -> Words:
    probe = Probe("convert", [values], len(values), variant=variant, count=len(values), num_blocks=4, num_threads=128)
    return bench.run(probe).outputs[0]


def awkward_floats() -> Words:
    """Every exponent with the mantissas around each rounding boundary, and a million at random."""
    ends = np.arange(2**16, dtype=np.uint32) << 16
    near = [ends + np.uint32(low) for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    steps = np.arange(2**14, dtype=np.uint32) << 18  # e4m3 keeps three bits: its ties have bit 19 set
    near += [steps + np.uint32(low) for low in (0, 1, 0x3FFFF)]
    return np.concatenate([*near, np.random.default_rng(1).integers(0, 2**32, 10**6, dtype=np.uint32)])


@pytest.mark.usefixtures("machine_without_race")
class TestConversions:
    def test_float_to_small_types(self, bench: Bench) -> None:
        floats = awkward_floats()
        got = run(bench, 0, floats)
        np.testing.assert_array_equal(got & 0xFFFF, oracle.bf16_from_float(floats))
        np.testing.assert_array_equal(got >> 16, oracle.e4m3_from_float(floats))

    def test_every_bfloat16(self, bench: Bench) -> None:
        halves = np.arange(2**16, dtype=np.uint32)
        np.testing.assert_array_equal(run(bench, 1, halves), halves << 16)

    def test_every_e4m3(self, bench: Bench) -> None:
        codes = np.arange(256, dtype=np.uint32)
        np.testing.assert_array_equal(run(bench, 2, codes), oracle.float_from_e4m3(codes))

    def test_pairs_keep_their_sides(self, bench: Bench) -> None:
        low = np.arange(2**16, dtype=np.uint32)
        high = np.random.default_rng(2).permutation(low).astype(np.uint32)
        quiet_low, quiet_high = (np.where((half & 0x7FFF) > 0x7F80, 0x7FFF, half) for half in (low, high))
        got = run(bench, 3, (high << 16 | low).astype(np.uint32))
        np.testing.assert_array_equal(got, quiet_low << 16 | quiet_high)
