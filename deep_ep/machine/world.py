"""The simulated world: a child process that holds the memory of all ranks and runs their kernels together.

It is a process of its own so that ThreadSanitizer needs no preload and a crash stays outside this one. The program is
deep_ep/machine/engine, built through deep_ep.jit when it is first needed; docs/simulator.md says how it works.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import IO, Literal

from deep_ep import jit
from deep_ep.errors import EPError

ENGINE_DIR = Path(__file__).parent / "engine"

# halt_on_error: the first race ends the world. ignore_noninstrumented_modules: the engine's own use of the C library
# on many stacks is none of the detector's business.
TSAN_OPTIONS = (
    "halt_on_error=1:exitcode=66:ignore_noninstrumented_modules=1:handle_segv=0:handle_sigbus=0:handle_sigfpe=0:"
    "handle_sigill=0:handle_abort=0:report_thread_leaks=0:detect_deadlocks=0:history_size=4"
)
NO_ADDRESS_RANDOMISATION = 0x0040000


class SimulationError(EPError):
    """A launch in the simulated world did not end well: a race, a deadlock, a misuse of a primitive, or a crash.

    Attributes:
        report: what the engine or the race detector found, with file and line of the kernel.
        seed: of the launch; the same seed, memory and kernels give the same run.
    """

    def __init__(self, report: str, seed: int, replay: str = "") -> None:
        hint = f"\nreplay: {replay}" if replay else ""
        super().__init__(f"simulated launch failed with seed {seed}: {report}{hint}")
        self.report = report
        self.seed = seed


@dataclass(frozen=True)
class Launch:
    """One kernel on one rank.

    Attributes:
        kernel: the shared object that jit.Gxx made.
        name: the entry, "deep_ep_dispatch", or without its prefix, "dispatch".
        args: the argument struct; addresses in it are the world's.
        rank: whose kernel this is, for reports.
        num_blocks: all of them are resident together.
        num_threads: of a block, as the kernel says itself.
        shared_bytes: of dynamic shared memory a block.
        cluster_blocks: blocks of a cluster.
        in_order: it starts when the launch before it of the same rank has ended, as in a CUDA stream; else at once.
    """

    kernel: Path
    name: str
    args: bytes
    rank: int
    num_blocks: int
    num_threads: int
    shared_bytes: int
    cluster_blocks: int = 1
    in_order: bool = False


@dataclass(frozen=True)
class Report:
    """What a good launch took.

    Attributes:
        num_steps: decisions of the scheduler.
        virtual_ns: what clock_ns showed at the end.
    """

    num_steps: int
    virtual_ns: int


class _Kind(IntEnum):
    ALLOCATE = 1
    FREE = 2
    WRITE = 3
    READ = 4
    LAUNCH = 5


class _Status(IntEnum):
    OK = 0
    REFUSED = 1
    FAILED = 2


@dataclass
class World:
    """A client of one child process; a context manager.

    Args:
        race_detector: run kernels that were built with jit.Gxx(race_detector=True) under ThreadSanitizer.
        replay: a command that runs the same again, with "{seed}" in it; failures print it.
        timeout_s: a launch that takes longer (a kernel that loops without calling primitives) ends the world.

    Raises:
        EPCompileError, EPEnvironmentError: the engine cannot be built here.
    """

    race_detector: bool = False
    replay: str = ""
    timeout_s: float = 300.0
    _process: subprocess.Popen[bytes] = field(init=False, repr=False)
    _stderr: IO[bytes] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        program = build_program(self.race_detector)
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the world)
        environment = dict(os.environ, TSAN_OPTIONS=TSAN_OPTIONS) if self.race_detector else None
        self._process = subprocess.Popen(
            [program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
            preexec_fn=_fix_addresses if self.race_detector else None,
        )

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_alive(self) -> bool:
        """Whether the child still runs: a race, a crash or close() ends it."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the child and forget its memory. May be called again."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._stderr):
            if pipe is not None and not pipe.closed:
                with contextlib.suppress(BrokenPipeError):  # what was not sent yet will not be
                    pipe.close()

    def allocate(self, num_bytes: int, *, fill: int = 0, name: str = "") -> int:
        """Make a region; pages before and after it trap.

        Args:
            fill: the value of every byte.
            name: for reports.

        Returns:
            its address in the world, a multiple of 128.
        """
        if num_bytes < 0 or not 0 <= fill <= 255:
            raise ValueError(f"a region needs num_bytes >= 0 and fill 0 to 255, not {num_bytes} and {fill}")
        answer = self._ask(_Kind.ALLOCATE, _pack(num_bytes, fill) + _text(name.encode()))
        return int(struct.unpack("=Q", answer)[0])

    def free(self, address: int) -> None:
        """Give a region back.

        Raises:
            ValueError: allocate did not return this address.
        """
        self._ask(_Kind.FREE, _pack(address))

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Copy bytes into one region.

        Raises:
            ValueError: they do not all lie in one.
        """
        self._ask(_Kind.WRITE, _pack(address), memoryview(data).cast("B"))

    def read(self, address: int, num_bytes: int) -> bytes:
        """Copy bytes out of one region.

        Raises:
            ValueError: they do not all lie in one.
        """
        return self._ask(_Kind.READ, _pack(address, num_bytes))

    def launch(
        self,
        launches: Sequence[Launch],
        *,
        seed: int,
        patience: Literal["report", "expire"] = "report",
        delays: Mapping[int, int] | None = None,
    ) -> Report:
        """Run kernels together until all have ended.

        Args:
            seed: decides every choice of the scheduler and the copy engines.
            patience: when nothing can move any more, "report" a deadlock, or let the waits with the earliest timeout
                "expire".
            delays: virtual nanoseconds by which each of a rank's kernels starts late.

        Raises:
            ValueError: a launch does not fit its kernel.
            SimulationError: see there. After a race or a crash the world is gone.
        """
        if patience not in ("report", "expire"):
            raise ValueError(f"patience is 'report' or 'expire', not {patience!r}")
        request = _pack(seed % 2**64, patience == "expire", len(launches))
        for launch in launches:
            entry = launch.name if launch.name.startswith("deep_ep_") else f"deep_ep_{launch.name}"
            request += _text(os.fsencode(launch.kernel)) + _text(entry.encode()) + _text(launch.args)
            request += _pack(launch.rank, launch.num_blocks, launch.num_threads, launch.shared_bytes)
            request += _pack(launch.cluster_blocks, (delays or {}).get(launch.rank, 0), launch.in_order)
        answer = self._ask(_Kind.LAUNCH, request, seed=seed)
        return Report(*struct.unpack("=QQ", answer[:16]))

    def _ask(self, kind: _Kind, *parts: bytes | memoryview, seed: int = 0) -> bytes:
        watchdog = threading.Timer(self.timeout_s, self._process.kill) if kind is _Kind.LAUNCH else None
        if watchdog:
            watchdog.daemon = True
            watchdog.start()
        try:
            self._send(kind, parts)
            status, num_bytes = struct.unpack("=QQ", self._receive(16))
            answer = self._receive(num_bytes)
        except (EOFError, BrokenPipeError, ValueError) as error:
            raise SimulationError(self._describe_end(), seed, self._replay(seed)) from error
        finally:
            if watchdog:
                watchdog.cancel()
        if status == _Status.REFUSED:
            raise ValueError(answer.decode(errors="replace"))
        if status == _Status.FAILED:
            raise SimulationError(answer[16:].decode(errors="replace"), seed, self._replay(seed))
        return answer

    def _send(self, kind: _Kind, parts: Sequence[bytes | memoryview]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(_pack(kind, sum(len(part) for part in parts)))
        for part in parts:
            self._process.stdin.write(part)
        self._process.stdin.flush()

    def _receive(self, num_bytes: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(num_bytes)
        if len(data) < num_bytes:
            raise EOFError
        return data

    def _replay(self, seed: int) -> str:
        return self.replay.replace("{seed}", str(seed))

    def _describe_end(self) -> str:
        """Why the child is gone: what it said before, or how it ended."""
        if self._stderr.closed:
            return "this world was closed"
        try:
            status = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "the world's process closed its pipes"
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip()
        if status == -9 and not said:
            return f"the launch took longer than {self.timeout_s} s (or the process was killed)"
        return _tidy_race(_name_lines(said)) if said else f"the world's process ended with status {status}"


@functools.cache
def build_program(race_detector: bool) -> Path:
    """The world's program, built or found built. The engine is a library of its own, never under the detector."""
    # As one translation unit: the standard library's headers take longer than all of the engine.
    files = sorted(path.name for path in ENGINE_DIR.glob("*.cpp") if path.name != "main.cpp")
    include = (ENGINE_DIR,)
    engine = jit.build_files(
        "engine",
        {"engine.cpp": "".join(f'#include "{name}"\n' for name in files)},
        jit.Gxx(more_include_dirs=include, more_flags=("-O2", "-g0"), artifact_name="libdeep_ep_engine.so"),
    )
    world = jit.build_files(
        "world",
        {"main.cpp": ENGINE_DIR / "main.cpp"},
        jit.Gxx(
            race_detector=race_detector,
            more_include_dirs=include,
            libraries=(engine.artifact,),
            artifact_name="world",
        ),
    )
    return world.artifact


def _fix_addresses() -> None:
    # ThreadSanitizer cannot live with every random layout, and equal addresses make equal reports.
    ctypes.CDLL(None).personality(NO_ADDRESS_RANDOMISATION)


def _pack(*values: int) -> bytes:
    return struct.pack(f"={len(values)}Q", *values)


def _text(data: bytes) -> bytes:
    return _pack(len(data)) + data


def _name_lines(report: str) -> str:
    """Replace each "pc OBJECT+OFFSET" of a crash report by the kernel's file and line, where addr2line exists."""
    addr2line = shutil.which("addr2line")
    found = re.search(r"pc (\S+)\+(0x[0-9a-f]+)", report)
    if addr2line is None or found is None:
        return report
    lines = subprocess.run(
        [addr2line, "-i", "-e", found[1], found[2]], capture_output=True, text=True, check=False
    ).stdout.split("\n")
    places = ", inlined in ".join(line for line in lines if line)
    return report.replace(found[0], "in " + re.sub(r"\S*/building/[^/]+/", "", places))


def _tidy_race(report: str) -> str:
    """Keep of a race what a kernel's author reads: the two accesses, with the names of those who made them."""
    names = dict(re.findall(r"^  Thread (T\d+) '([^']+)'", report, re.MULTILINE))
    names["main thread"] = "the host"
    lines = re.sub(r"^  Thread T\d+ .*?\n\n", "", report, flags=re.MULTILINE | re.DOTALL)
    lines = re.sub(
        r"^ +#\d+ .*(machine/engine/|/engine\.cpp|libc_start_call_main|run_fiber).*\n", "", lines, flags=re.MULTILINE
    )
    for thread, name in names.items():
        lines = re.sub(rf"by (thread )?{thread}\b", f"by {name}", lines)
    return lines
