"""What one SM loads, stores and copies, and many at once: of which every call has a floor of its own.

    python -m benchmarks.sm --sms 1,16,24,48 --json sm.json

On one GPU, without peers: rows in any order from memory that no cache holds, to rows in order. GB/s of each SM, by the
copy engine's rings and by threads; a launch of a few microseconds is in it. What is copied counts once. Of memory: what
is read and written with the last number of SMs, over what the copy engine reads and writes in the same run.
"""

from __future__ import annotations

import argparse
import ctypes
import enum
import functools
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.ep import numbers
from benchmarks.report import writable
from deep_ep import plan
from deep_ep.jit import Built, Kernel, Nvrtc, build

ROWS, ROW_BYTES = 8192, 7168
FROM_ROWS = 8 * ROWS  # to be drawn from: several times any L2
FLUSH_BYTES = 512 << 20
HOST_AHEAD_CYCLES = 200_000  # in which the host has launched what is timed
REPEATS = 11
SHARED_LIMIT = 227 << 10  # of a block, on the GPUs that this is for
STAGES = 3


class By(enum.Enum):
    COPY_ENGINE = "kCopyEngine"
    THREADS = "kThreads"


@dataclass(frozen=True)
class MoveConfig:
    num_warps: int
    num_stages: int
    row_bytes: int
    by: By
    loads: bool
    stores: bool


class MoveArgs(ctypes.Structure):
    _fields_ = [
        ("from", ctypes.c_void_p),
        ("to", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("num_rows", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class Way:
    """How rows are moved."""

    name: str
    by: By
    num_warps: int
    loads: bool = True
    stores: bool = True

    @property
    def kernel(self) -> Kernel:
        config = MoveConfig(self.num_warps, STAGES, ROW_BYTES, self.by, self.loads, self.stores)
        return Kernel("move", config, MoveArgs, 32 * self.num_warps, header="sm.cuh")

    @property
    def shared_bytes(self) -> int:
        """Of a block's rings."""
        crew = plan.Crew(self.num_warps, STAGES, 1)
        return 0 if self.by is By.THREADS else plan.ring(crew, SHARED_LIMIT, ROW_BYTES, tail_bytes=0).rings_bytes


WAYS = [
    Way("loads, copy engine", By.COPY_ENGINE, 9, stores=False),
    Way("loads, threads", By.THREADS, 16, stores=False),
    Way("stores, copy engine", By.COPY_ENGINE, 9, loads=False),
    Way("stores, threads", By.THREADS, 16, loads=False),
    Way("copies, copy engine", By.COPY_ENGINE, 9),
    Way("copies, threads", By.THREADS, 16),
]


def compiled(way: Way, architecture: str) -> Built:
    return build(way.kernel, Nvrtc(architecture, more_include_dirs=(Path(__file__).parent,)))


class Mover:
    """Moves rows on the current device."""

    def __init__(self) -> None:
        from cuda.bindings import driver

        self._driver: Any = driver
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._from = torch.randint(0, 255, (FROM_ROWS, ROW_BYTES), dtype=torch.uint8, device=self.device)
        self._to = torch.empty(ROWS, ROW_BYTES, dtype=torch.uint8, device=self.device)
        self._order = torch.randperm(FROM_ROWS, device=self.device)[:ROWS].int()
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device)

    def prepare(self, way: Way) -> Callable[[int], None]:
        """A launch of so many blocks. What copies leave behind is looked at."""
        major, minor = torch.cuda.get_device_capability(self.device)
        module = self._call("cuModuleLoadData", compiled(way, f"sm_{major}{minor}a").code)
        function = self._call("cuModuleGetFunction", module, way.kernel.entry.encode())
        most = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._call("cuFuncSetAttribute", function, most, way.shared_bytes)
        args = MoveArgs(self._from.data_ptr(), self._to.data_ptr(), self._order.data_ptr(), ROWS)
        pointer = (ctypes.c_void_p * 1)(ctypes.addressof(args))

        def launch(blocks: int) -> None:
            assert args  # the pointer does not keep it
            stream = torch.cuda.current_stream(self.device).cuda_stream
            block = (32 * way.num_warps, 1, 1)
            address = ctypes.addressof(pointer)
            self._call("cuLaunchKernel", function, blocks, 1, 1, *block, way.shared_bytes, stream, address, 0)

        if way.loads and way.stores:
            for blocks in (1, 7):
                self._to.zero_()
                launch(blocks)
                assert torch.equal(self._to, self._from[self._order.long()]), (way.name, blocks)
        return launch

    def memory_gbs(self) -> float:
        """What the copy engine reads and writes."""
        return 2 * FLUSH_BYTES / self.median(lambda: self._flush.clone()) / 1e3

    def median(self, launch: Callable[[], Any]) -> float:
        """Microseconds, nothing of it in a cache."""
        launch()
        times = []
        for _ in range(REPEATS):
            self._flush.view(torch.int64).sum()  # read, so that nothing of it has to be written back meanwhile
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(HOST_AHEAD_CYCLES)
            start.record()
            launch()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        return statistics.median(times)

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self._driver, name)(*arguments)
        assert int(status) == 0, f"{name}: {status}"
        return values[0] if len(values) == 1 else values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sms", type=numbers, default=[1, 16, 24, 48], help="numbers of SMs, each with a block")
    parser.add_argument("--json", type=writable, help="a file for all that was measured")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.sm needs a GPU, and torch sees none")
    from rich.console import Console
    from rich.table import Table

    mover = Mover()
    facts = {"device": torch.cuda.get_device_name(mover.device), "torch": torch.__version__}
    facts |= {"rows": ROWS, "row_bytes": ROW_BYTES, "memory_gbs": round(mover.memory_gbs(), 1)}
    title = "{device}: {rows} rows of {row_bytes} bytes; memory {memory_gbs} GB/s".format_map(facts)
    table = Table("GB/s of each SM", *map(str, arguments.sms), "of memory", title=title)
    found = {}
    for way in WAYS:
        launch = mover.prepare(way)
        times = [mover.median(functools.partial(launch, sms)) for sms in arguments.sms]
        rates = [ROWS * ROW_BYTES / time / 1e3 / sms for sms, time in zip(arguments.sms, times, strict=True)]
        found[way.name] = dict(zip(arguments.sms, rates, strict=True))
        of_memory = rates[-1] * arguments.sms[-1] * (way.loads + way.stores) / facts["memory_gbs"]
        table.add_row(f"{way.name}, {way.num_warps} warps", *(f"{rate:.0f}" for rate in rates), f"{of_memory:.0%}")
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"facts": facts, "gbs_of_each_sm": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
