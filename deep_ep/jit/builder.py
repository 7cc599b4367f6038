"""From a kernel to machine code: out of the store if it is there, else through a compiler and into the store."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from deep_ep.errors import EPCompileError, EPEnvironmentError
from deep_ep.jit.key import make_key
from deep_ep.jit.module import Resources, parse_resources
from deep_ep.jit.source import Kernel, generate
from deep_ep.jit.store import Entry, Store, private_store, warn_once
from deep_ep.jit.toolchain import Toolchain
from deep_ep.jit.tools import CompilerError

logger = logging.getLogger("deep_ep")

SLOW_SECONDS = 1.0
LOG = "log.txt"
COMMAND = "command.txt"


@dataclass(frozen=True)
class Built:
    """Machine code and where it lies.

    Attributes:
        folder: source, artifact, command.txt, log.txt and manifest.json; valid as long as this process lives.
        artifact: the cubin, shared object or program in it.
        code: the artifact's bytes, verified.
        log: what the compiler said, then or now.
        resources: what a GPU kernel needs; None for the simulated machine.
        seconds: how long this call took.
        hit: whether it came out of the store.
    """

    folder: Path
    artifact: Path
    code: bytes
    log: str
    resources: Resources | None
    seconds: float
    hit: bool


def build(kernel: Kernel, toolchain: Toolchain, *, store: Store | None = None) -> Built:
    """Build a kernel, or find it built.

    Args:
        store: by default, the one at EP_JIT_CACHE_DIR.

    Raises:
        TypeError, ValueError: the kernel's description is wrong, or not for this toolchain.
        EPCompileError: the source does not compile, or it spills and EP_JIT_PTXAS_CHECK is set.
        EPEnvironmentError: there is no compiler, or no folder that can be written.
    """
    toolchain.check(kernel)
    return build_files(kernel.name, {toolchain.source_name: generate(kernel)}, toolchain, store=store)


def build_files(
    name: str, sources: Mapping[str, str | Path], toolchain: Toolchain, *, store: Store | None = None
) -> Built:
    """Build some source files into one artifact, or find it built; ``build`` and the simulator's engine use it.

    Args:
        name: for people, in folder names and messages.
        sources: by file name, either the text or the path of a file that holds it. Headers come from the toolchain's
            include_dirs, never from beside such a path.

    Raises:
        as ``build``.
    """
    start = time.perf_counter()
    texts = {file: text.read_bytes() if isinstance(text, Path) else text.encode() for file, text in sources.items()}
    key = make_key(toolchain, texts)
    entry_name = f"{name}-{toolchain.name}-{toolchain.architecture}-{key[:24]}"
    store = store or Store(toolchain.environment.jit_cache_dir)
    entry = store.find(entry_name, key)
    hit = entry is not None
    if entry is None:
        job = _Job(name, entry_name, key, texts, toolchain)
        try:
            entry, hit = _find_or_compile(job, store)
        except _HeaderEditedError:
            return build_files(name, sources, toolchain, store=store)
    built = _wrap(entry, toolchain, time.perf_counter() - start, hit)
    _tell(name, toolchain, built)
    return built


def precompile(kernels: Sequence[Kernel], toolchain_of: Callable[[Kernel], Toolchain]) -> list[Built]:
    """Build several kernels now, a few at a time, so that no first call waits for a compiler.

    Args:
        toolchain_of: says what builds a kernel.

    Returns:
        what ``build`` returns, in the order of kernels.

    Raises:
        as ``build``; the first error, after all others have ended.
    """
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # compilers give the GIL away
        return list(pool.map(lambda kernel: build(kernel, toolchain_of(kernel)), kernels))


@dataclass(frozen=True)
class _Job:
    """What to compile; entry_name and key say where it goes."""

    name: str
    entry_name: str
    key: str
    texts: Mapping[str, bytes]
    toolchain: Toolchain


class _HeaderEditedError(Exception):
    """A header changed while a compile ran: nobody knows which version the compiler saw."""


def _find_or_compile(job: _Job, store: Store) -> tuple[Entry, bool]:
    """Compile into the store; into this process's own when the shared one cannot be written or trusted.

    Returns:
        the entry, and whether it was found there.
    """
    try:
        return _compile(job, store), False
    except OSError as error:
        warn_once(
            f"the JIT cache {store.root} cannot be used ({error.strerror or error}); kernels are built in a private "
            f"temporary folder, again in every process. Set EP_JIT_CACHE_DIR to a folder that only you can write to"
        )
    try:
        private = private_store()
        entry = private.find(job.entry_name, job.key)
        return (entry, True) if entry else (_compile(job, private), False)
    except OSError as error:
        raise EPEnvironmentError(
            f"no folder can be written to build {job.name} ({error}); set EP_JIT_CACHE_DIR or TMPDIR to one"
        ) from error


def _compile(job: _Job, store: Store) -> Entry:
    toolchain = job.toolchain
    command = toolchain.command(list(job.texts))
    if toolchain.environment.jit_print_compiler_command:
        _show(command)
    with store.workspace() as folder:
        for file, text in job.texts.items():
            (folder / file).write_bytes(text)
        (folder / COMMAND).write_text(command + "\n")
        try:
            with _announced_when_slow(job.name, toolchain):
                log = toolchain.compile(folder, list(job.texts))
        except CompilerError as error:
            with contextlib.suppress(OSError):
                (folder / LOG).write_text(error.log + "\n")
            kept = store.keep_failed(folder, job.entry_name)
            raise EPCompileError(f"{job.name} ({toolchain.name})", command, error.log, kept) from None
        (folder / LOG).write_text(log + "\n")
        if make_key(toolchain, job.texts) != job.key:
            raise _HeaderEditedError
        resources = parse_resources(log)
        facts = {"resources": asdict(resources) if resources else None}
        return store.publish(folder, job.entry_name, job.key, facts)


def _wrap(entry: Entry, toolchain: Toolchain, seconds: float, hit: bool) -> Built:
    artifact = toolchain.outputs[0]
    noted = entry.facts["resources"]
    return Built(
        folder=entry.folder,
        artifact=entry.folder / artifact,
        code=entry.files[artifact],
        log=entry.files[LOG].decode(errors="replace"),
        resources=Resources(**noted) if noted else None,
        seconds=seconds,
        hit=hit,
    )


def _tell(name: str, toolchain: Toolchain, built: Built) -> None:
    """Say what was asked for by the environment, and fail where it asks to."""
    environment = toolchain.environment
    if environment.jit_debug:
        how = "loaded" if built.hit else "built"
        _show(f"deep_ep.jit {how} {name} in {built.seconds * 1e3:.1f} ms: {built.folder}")
    if environment.jit_ptxas_verbose and built.resources:
        _show(built.log.rstrip())
    if environment.jit_ptxas_check and built.resources and built.resources.uses_local_memory:
        command = (built.folder / COMMAND).read_text().strip()
        what = f"{name} ({toolchain.name}) passes EP_JIT_PTXAS_CHECK only without spills and local memory, and so"
        raise EPCompileError(what, command, f"{built.log}\n{built.resources}", built.folder)


def _show(text: str) -> None:
    """Print what a variable of the environment asked for."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


@contextlib.contextmanager
def _announced_when_slow(name: str, toolchain: Toolchain) -> Iterator[None]:
    """Log that a compile takes more than a second, when it does: whoever waits learns what for."""
    start = time.perf_counter()
    timer = threading.Timer(
        SLOW_SECONDS, lambda: logger.info("compiling %s with %s takes more than a second", name, toolchain.name)
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        seconds = time.perf_counter() - start
        if seconds > SLOW_SECONDS:
            logger.info("compiled %s with %s in %.1f s", name, toolchain.name, seconds)
