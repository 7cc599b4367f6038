"""From a kernel's fault record to the error that a user reads."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch

import deep_ep
from deep_ep.errors import EPError, EPTimeoutError
from deep_ep.layout import PLAN_WORDS
from deep_ep.ops.arguments import FaultRecord, PlanFlag
from deep_ep.ops.faults import (
    DIFFER,
    EPOCH_BITS,
    FLAGS,
    LOCAL,
    OPERATIONS,
    PHASES,
    READABLE,
    ROUTES,
    SIZES,
    WHY,
    check_fault,
)

WIRE = Path(deep_ep.__file__).parent / "include" / "deep_ep" / "wire"
HEADER, PLAN_HEADER = WIRE / "phase.cuh", WIRE / "plan.cuh"


def words_of(fault: FaultRecord) -> torch.Tensor:
    return torch.frombuffer(bytearray(bytes(fault)), dtype=torch.int32)


def fault_of(phase: int, state: int = READABLE) -> FaultRecord:
    return FaultRecord(
        state=state, phase=phase, block=3, thread=65, peer=1, expected=0x80000001, seen=12, waited_ns=10_500_000_000
    )


@pytest.mark.parametrize("state", [0, 1])
def test_nothing_is_raised_before_the_record_is_whole(state: int) -> None:
    check_fault(words_of(fault_of(phase=3, state=state)), rank=0, gone={})


@pytest.mark.parametrize("phase", PHASES)
def test_says_who_waited_for_whom_where_and_how_long(phase: int) -> None:
    with pytest.raises(EPTimeoutError) as caught:
        check_fault(words_of(fault_of(phase)), rank=5, gone={})
    text = str(caught.value)
    name = PHASES[phase].partition(":")[0]
    assert text.startswith(f"rank 5 waited 10.5 s in {name}: for ")
    assert "(block 3, thread 65; expected epoch 2147483649, saw 12)" in text
    assert "num_gpu_timeout_secs" in text
    why = "something else held up this GPU" if phase in LOCAL else f"Rank 1 {WHY[phase]}; its own error or log says"
    assert why in text
    assert "{" not in text


def test_a_phase_without_a_name_is_still_told() -> None:
    with pytest.raises(EPTimeoutError, match="in phase 99: for rank 1"):
        check_fault(words_of(fault_of(99)), rank=0, gone={})


def test_every_phase_of_the_headers_has_words() -> None:
    in_headers = re.findall(r"constexpr uint32_t k(\w+) = (\d+);", HEADER.read_text())
    snake = {int(number): re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower() for name, number in in_headers}
    assert snake == {number: text.partition(":")[0] for number, text in PHASES.items()} | {DIFFER: "differ"}


def test_every_word_of_a_plan_has_words() -> None:
    operations, flags = PLAN_HEADER.read_text().split("namespace plan_flag {")
    assert f"constexpr int kEpochBits = {EPOCH_BITS};" in flags
    constants = re.compile(r"constexpr uint32_t k(\w+) = (\d+);")
    assert {int(number): name.lower() for name, number in constants.findall(operations)} == OPERATIONS
    assert [int(number) for _, number in constants.findall(flags)] == list(PlanFlag) == list(FLAGS)
    assert len(SIZES) + 3 == ROUTES + 2 == PLAN_WORDS, "the last one, of tokens, need not be the same"


def differing(item: int, ours: int, theirs: int) -> str:
    fault = FaultRecord(state=READABLE, phase=DIFFER | item << 8, peer=3, expected=ours, seen=theirs)
    with pytest.raises(EPError) as caught:
        check_fault(words_of(fault), rank=1, gone={})
    assert not isinstance(caught.value, EPTimeoutError)
    text = str(caught.value)
    assert "Every rank must make the same calls in the same order, with the same sizes and handles." in text
    return text


def test_says_how_calls_differ() -> None:
    text = differing(0, ours=1 | 1 << 8 | 6 << 24, theirs=2 | 8 << 24)
    assert text.startswith("rank 3 called combine (num_topk 8), rank 1 called dispatch (num_topk 6, topk_weights).")
    assert "operation 9" in differing(0, ours=1, theirs=9)
    text = differing(0, ours=1 | 6 << 24, theirs=3)
    assert text.startswith("rank 3 called barrier, rank 1 called dispatch (num_topk 6).")
    text = differing(2, ours=128, theirs=64)
    assert text.startswith("rank 3 made this call with num_max_tokens_per_rank 64, rank 1 with 128.")
    for item, size in enumerate(SIZES, start=1):
        assert f"with {size} 5, rank 1 with 4" in differing(item, ours=4, theirs=5)
    text = differing(ROUTES, ours=2 << EPOCH_BITS | 7, theirs=9)
    assert text.startswith("rank 3 used the handle of call 9 on buffer 0 of this group, rank 1 the one of call 7 on")


def test_the_record_is_as_large_as_devices_write_it() -> None:
    assert ctypes.sizeof(FaultRecord) == 40
