"""What a built kernel needs from the device, read from the assembler's log."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Resources:
    """Per thread, but for the shared memory, which is per block; dynamic shared memory is not in it."""

    registers: int
    stack_bytes: int
    spill_bytes: int
    static_shared_bytes: int

    @property
    def uses_local_memory(self) -> bool:
        """Whether a thread keeps anything in memory that is slow and that nobody asked for."""
        return self.stack_bytes > 0 or self.spill_bytes > 0

    def __str__(self) -> str:
        return (
            f"{self.registers} registers, {self.stack_bytes} bytes of stack, {self.spill_bytes} bytes of spills, "
            f"{self.static_shared_bytes} bytes of static shared memory"
        )


def parse_resources(log: str) -> Resources | None:
    """Read what ``ptxas -v`` wrote; the worst of all functions in it.

    Returns:
        None when the log is of a compiler that runs no ptxas.
    """
    registers = _numbers(r"Used (\d+) registers", log)
    if not registers:
        return None
    return Resources(
        registers=max(registers),
        stack_bytes=max(_numbers(r"(\d+) bytes (?:stack frame|cumulative stack size)", log), default=0),
        spill_bytes=sum(_numbers(r"(\d+) bytes spill (?:stores|loads)", log)),
        static_shared_bytes=max(_numbers(r"(\d+) bytes smem", log), default=0),
    )


def _numbers(pattern: str, text: str) -> list[int]:
    return [int(number) for number in re.findall(pattern, text)]
