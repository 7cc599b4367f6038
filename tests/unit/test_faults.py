"""From a kernel's fault record to the error that a user reads."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch

import deep_ep
from deep_ep.errors import EPTimeoutError
from deep_ep.ops.arguments import FaultRecord
from deep_ep.ops.faults import PHASES, READABLE, check_fault

HEADER = Path(deep_ep.__file__).parent / "include" / "deep_ep" / "wire" / "phase.cuh"


def words_of(fault: FaultRecord) -> torch.Tensor:
    return torch.frombuffer(bytearray(bytes(fault)), dtype=torch.int32)


def fault_of(phase: int, state: int = READABLE) -> FaultRecord:
    return FaultRecord(
        state=state, phase=phase, block=3, thread=65, peer=1, expected=0x80000001, seen=12, waited_ns=10_500_000_000
    )


@pytest.mark.parametrize("state", [0, 1])
def test_nothing_is_raised_before_the_record_is_whole(state: int) -> None:
    check_fault(words_of(fault_of(phase=3, state=state)), rank=0)


@pytest.mark.parametrize("phase", PHASES)
def test_says_who_waited_for_whom_where_and_how_long(phase: int) -> None:
    with pytest.raises(EPTimeoutError) as caught:
        check_fault(words_of(fault_of(phase)), rank=5)
    text = str(caught.value)
    name = PHASES[phase].partition(":")[0]
    assert text.startswith(f"rank 5 waited 10.5 s in {name}: for ")
    assert "(block 3, thread 65; expected epoch 2147483649, saw 12)" in text
    assert "num_gpu_timeout_secs" in text
    assert "{" not in text


def test_a_phase_without_a_name_is_still_told() -> None:
    with pytest.raises(EPTimeoutError, match="in phase 99: for rank 1"):
        check_fault(words_of(fault_of(99)), rank=0)


def test_every_phase_of_the_headers_has_words() -> None:
    in_headers = re.findall(r"constexpr uint32_t k(\w+) = (\d+);", HEADER.read_text())
    snake = {int(number): re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower() for name, number in in_headers}
    assert snake == {number: text.partition(":")[0] for number, text in PHASES.items()}


def test_the_record_is_as_large_as_devices_write_it() -> None:
    assert ctypes.sizeof(FaultRecord) == 40
