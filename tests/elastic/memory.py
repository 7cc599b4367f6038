"""Whether memory grows with the number of calls."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import dataclass
from pathlib import Path

import torch

# What allocators and lazily loaded kernels may take beside: the heap of a simulated rank 0, which copies all ranks'
# memory, goes up and down by 30 MiB. A leak of 6 KB a trip shows after 10,000.
SPARE, SPARE_A_TRIP = 48 << 20, 1 << 10


@dataclass(frozen=True)
class Memory:
    """Bytes in use: of this process and those that it started, of torch's allocator, and of the whole GPU."""

    private: int
    allocated: int = 0
    device: int = 0

    @staticmethod
    def now(device: torch.device) -> Memory:
        """Once everything that may be given back has been."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        private = _private_bytes("self")
        if device.type != "cuda":
            return Memory(private)
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return Memory(private, torch.cuda.memory_allocated(device), total - free)

    def __str__(self) -> str:
        sizes = {"private": self.private, "of torch": self.allocated, "of the GPU": self.device}
        return ", ".join(f"{size / (1 << 20):.1f} MiB {name}" for name, size in sizes.items() if size)


def check_growth(before: Memory, after: Memory, num_trips: int) -> None:
    """Raises AssertionError if so many trips have left more than they may."""
    spare = SPARE + num_trips * SPARE_A_TRIP
    for name in ("private", "allocated", "device"):
        grown = getattr(after, name) - getattr(before, name)
        assert grown <= spare, f"{num_trips} round trips left {grown:,} bytes ({name}): {before}; then {after}"


def _private_bytes(process: str) -> int:
    """Anonymous pages in memory, of a process and its children: no shared windows, no files."""
    folder = Path("/proc") / process
    try:
        status = (folder / "status").read_text()
        children = [child for task in folder.glob("task/*/children") for child in task.read_text().split()]
    except OSError:  # it has ended
        return 0
    own = next((line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")), "0")
    return int(own) * 1024 + sum(map(_private_bytes, children))
