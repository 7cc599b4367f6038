"""From the fault record that a kernel left to the error that a user reads."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from deep_ep.errors import EPError, EPTimeoutError, WaitReport
from deep_ep.ops.arguments import FaultRecord, PlanFlag

READABLE = 2  # FaultRecord.state
FAULT_WORDS = ctypes.sizeof(FaultRecord) // 4  # of one record; a fault and a notice lie one behind the other

# The waits of include/deep_ep/wire/phase.cuh.
PHASES = {
    1: "admit: for rank {peer} to end the call before this one",
    2: "look_back: for another block of its own to count its tokens",
    3: "collect: for rank {peer} to say how many tokens it sends",
    4: "copy_out: for a token of rank {peer}",
    5: "reduce: for a partial result of rank {peer}",
    6: "label: for rank {peer} to say which tokens come, and where they go",
    7: "agree: for rank {peer} to make the same call",
    9: "find_rows: for rank {peer} to say where its rows lie",
    10: "await_readers: for rank {peer} to have read this rank's rows in place",
}

# What the rank that did not come may be doing: who gives up leaves others waiting, so it need not have begun it.
BEHIND = "has not begun this call: it is late, makes another one, or waits itself in an earlier one"
LATE = "is late, makes another call, or waits itself for a third rank"
STUCK = "has begun this call; it waits itself for a third rank, or has given up because this rank came too late"
WHY = {1: BEHIND, 3: LATE, 4: STUCK, 5: LATE, 6: LATE, 7: BEHIND, 9: LATE, 10: STUCK}
LOCAL = (2,)  # waits for this rank's own blocks

# No wait: a rank called something else. The words of include/deep_ep/wire/plan.cuh, in their order.
DIFFER = 8
PHASE_BITS = 8
OPERATIONS = {1: "dispatch", 2: "combine", 3: "barrier"}
FLAGS = {
    PlanFlag.WEIGHTS: "topk_weights",
    PlanFlag.CACHED: "a handle",
    PlanFlag.SCALES: "scale factors",
    PlanFlag.EVERY_ROW: "expanded rows that are added in one step",
    PlanFlag.IN_PLACE: "zero_copy",
    PlanFlag.CPU_SYNC: "do_cpu_sync",
}
SIZES = ("num_experts", "num_max_tokens_per_rank", "bytes of a row", "bytes beside a row")
ROUTES = len(SIZES) + 1  # the word behind those
EPOCH_BITS = 20  # of the number of routes


def check_fault(words: torch.Tensor, rank: int, gone: Mapping[int, str]) -> None:
    """Raise what a kernel recorded.

    Args:
        words: int32 on the CPU, the memory of a FaultRecord.
        rank: of this process, for the message.
        gone: what is known of peers that cannot come.

    Raises:
        EPTimeoutError: a wait of a kernel timed out.
        EPError: a peer made another call.
    """
    if int(words[0]) != READABLE:
        return
    fault = FaultRecord.from_buffer_copy(words.numpy().tobytes())
    if fault.phase % (1 << PHASE_BITS) == DIFFER:
        raise EPError(
            f"{difference(fault, rank)}. Every rank must make the same calls in the same order, with the same sizes "
            "and handles. Destroy this buffer on every rank and build a new one"
        )
    raise EPTimeoutError(
        f"rank {rank} {describe_wait(fault)}. {reason(fault, gone)}. Every rank must make the same calls in the same "
        "order. Destroy this buffer on every rank and build a new one; num_gpu_timeout_secs sets the limit",
        WaitReport(
            rank=rank,
            phase=phase_of(fault).partition(":")[0],
            peers=(fault.peer,),
            seconds=fault.waited_ns / 1e9,
            counters={"expected_epoch": fault.expected, "seen_epoch": fault.seen},
        ),
    )


@dataclass(frozen=True)
class Notice:
    """What a kernel says that waits."""

    text: str
    peer: int | None  # that it waits for


def take_notice(words: torch.Tensor, rank: int) -> Notice | None:
    """What a kernel says that has waited long, and waits on; told once.

    Args:
        words: as for ``check_fault``; the notice lies behind the fault.
    """
    notice = words[FAULT_WORDS : 2 * FAULT_WORDS]
    if int(notice[0]) != READABLE:
        return None
    wait = FaultRecord.from_buffer_copy(notice.numpy().tobytes())
    notice[0] = 0  # the next one may come
    return Notice(f"rank {rank} has {describe_wait(wait)}", None if wait.phase in LOCAL else wait.peer)


def phase_of(fault: FaultRecord) -> str:
    """In which phase, and for what."""
    return PHASES.get(fault.phase, f"phase {fault.phase}: for rank {{peer}}").format(peer=fault.peer)


def describe_wait(fault: FaultRecord) -> str:
    return (
        f"waited {fault.waited_ns / 1e9:.1f} s in {phase_of(fault)} (block {fault.block}, thread {fault.thread}; "
        f"expected epoch {fault.expected}, saw {fault.seen})"
    )


def reason(fault: FaultRecord, gone: Mapping[int, str]) -> str:
    """What may be the matter with the peer."""
    if fault.phase in LOCAL:
        return "No peer is to blame for that: something else held up this GPU"
    if fault.peer in gone:
        return f"Rank {fault.peer} {gone[fault.peer]}: simulated ranks learn that at once, and wait in virtual time"
    return f"Rank {fault.peer} {WHY.get(fault.phase, LATE)}; its own error or log says which"


def difference(fault: FaultRecord, rank: int) -> str:
    """What the peer called, and what this rank did; the record holds the first of the plan's words that differ."""
    item = fault.phase >> PHASE_BITS
    if item == ROUTES:
        theirs, ours = describe_routes(fault.seen), describe_routes(fault.expected)
        return f"rank {fault.peer} used the handle of {theirs}, rank {rank} the one of {ours}"
    if item > 0:
        size = SIZES[item - 1]
        return f"rank {fault.peer} made this call with {size} {fault.seen}, rank {rank} with {fault.expected}"
    theirs, ours = describe_call(fault.seen), describe_call(fault.expected)
    return f"rank {fault.peer} called {theirs}, rank {rank} called {ours}"


def describe_call(what: int) -> str:
    """The plan's first word in words: an operation, its flags, its selections."""
    operation = OPERATIONS.get(what & 0xFF, f"operation {what & 0xFF}")
    if operation == "barrier":
        return operation
    flags = "".join(f", {name}" for flag, name in FLAGS.items() if what >> 8 & flag)
    return f"{operation} (num_topk {what >> 24}{flags})"


def describe_routes(number: int) -> str:
    """Which dispatch has found them; calls on a buffer count from 1, those that a CUDA graph replays among them."""
    call, buffer = number % (1 << EPOCH_BITS), number >> EPOCH_BITS
    return f"call {call} on buffer {buffer} of this group"
