"""From the fault record that a kernel left to the error that a user reads."""

from __future__ import annotations

import torch

from deep_ep.errors import EPTimeoutError
from deep_ep.ops.arguments import FaultRecord

READABLE = 2  # FaultRecord.state

# The waits of include/deep_ep/wire/phase.cuh.
PHASES = {
    1: "admit: for rank {peer} to finish reading the operation before this one",
    2: "look_back: for another block of its own to count its tokens",
    3: "collect: for rank {peer} to say how many tokens it sends",
    4: "copy_out: for a token of rank {peer}",
    5: "reduce: for a partial result of rank {peer}",
    6: "settle: for another block of its own to place its tokens",
}


def check_fault(words: torch.Tensor, rank: int) -> None:
    """Raise what a kernel recorded.

    Args:
        words: int32 on the CPU, the memory of a FaultRecord.
        rank: of this process, for the message.

    Raises:
        EPTimeoutError: a wait of a kernel timed out.
    """
    if int(words[0]) != READABLE:
        return
    fault = FaultRecord.from_buffer_copy(words.numpy().tobytes())
    what = PHASES.get(fault.phase, f"phase {fault.phase}: for rank {{peer}}").format(peer=fault.peer)
    raise EPTimeoutError(
        f"rank {rank} waited {fault.waited_ns / 1e9:.1f} s in {what} (block {fault.block}, thread {fault.thread}; "
        f"expected epoch {fault.expected}, saw {fault.seen}). Every rank must make the same calls in the same order; "
        f"see what rank {fault.peer} did instead. Destroy this buffer on every rank and build a new one; "
        "num_gpu_timeout_secs sets the limit"
    )
