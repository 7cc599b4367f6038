"""One rank hosts what all of them share: a thread that takes what each rank's step brings, and serves them together.

Ranks are processes of one machine, so they come through a socket in a folder that only this user can enter. A rank
that dies is noticed at once, one that does not come when the limit of those who came has passed; then those are served
alone, and nobody waits for anybody any more.

The host's own buffer may go before the others': its calls return while theirs still run. So the thread stays for them,
until they have hung up too, or until nobody can still be waiting.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import shutil
import socket
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from deep_ep.errors import EPError
from deep_ep.waiting import notice_seconds

logger = logging.getLogger("deep_ep")

HOSTING_RANK = 0
END_SECONDS = 5.0  # how long a process that ends stays for its peers
# What a rank has done that is missing in a step.
LATE = "did not come"
GONE = "has destroyed or dropped its buffer, or died"


@dataclass(frozen=True)
class Ask:
    """What a rank brings to a step.

    Attributes:
        what: names the step; ranks in different ones are told so.
        payload: anything that can be pickled.
        limit_s: how long this rank waits for its peers.
        alone: the step needs no peer and is served at once.
        detail: more of what this rank does, for people.
    """

    what: str
    payload: Any
    limit_s: float
    alone: bool = False
    detail: str = ""

    @property
    def text(self) -> str:
        """The step in words."""
        return f"{self.what} of {self.detail}" if self.detail else self.what


Serve = Callable[[Mapping[int, Ask], Mapping[int, str]], Mapping[int, Any]]


class Host:
    """The thread.

    Args:
        serve: runs in it: it takes the asks of those who came, by rank, and of the ranks that did not what they have
            done instead, and returns an answer for each of the former; it must not raise.
        limit_s: for the ranks to connect.
        at_the_end: runs in the thread, last of all.
    """

    def __init__(self, num_ranks: int, serve: Serve, limit_s: float, at_the_end: Callable[[], None]) -> None:
        self._serve, self._at_the_end = serve, at_the_end
        self._limit_s = limit_s
        self._missing = dict.fromkeys(range(num_ranks), "has not connected")  # and those that have left
        self._lines: dict[int, Connection] = {}
        self._last: dict[int, str] = {}  # each rank's last step
        self._all_came = True  # to every step so far
        self._deadline = math.inf  # when the thread ends, whoever is still there
        self._process = os.getpid()
        self._folder = tempfile.mkdtemp(prefix="deep_ep-")
        self.address = os.path.join(self._folder, "host")
        self._door = socket.socket(socket.AF_UNIX)
        self._door.bind(self.address)
        self._door.listen(num_ranks)
        self._bell, self._ear = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="deep_ep host", daemon=True)
        self._thread.start()
        _HOSTS.add(self)

    def leave(self, limit_s: float) -> None:
        """The hosting rank leaves. The thread serves the others until they have left too, or for ``limit_s``; then
        whoever waits for a peer is served without it. Waits for nobody, may be called again and on any thread; nothing
        in a forked child, which has no such thread."""
        if os.getpid() == self._process:
            self._deadline = min(self._deadline, time.monotonic() + limit_s)
            with contextlib.suppress(OSError):  # it has ended
                self._bell.send(b"!")

    def join(self, limit_s: float) -> None:
        """Wait for the thread's end."""
        if os.getpid() == self._process and threading.current_thread() is not self._thread:
            self._thread.join(limit_s)

    def _run(self) -> None:
        try:
            self._let_in()
            while asks := self._gather():
                missing = self._missing_in(asks)
                answers, self._all_came = self._serve(asks, missing), not missing
                for rank, answer in answers.items():
                    self._tell(rank, answer)
        finally:
            for line in self._lines.values():
                line.close()
            self._ear.close()
            self._at_the_end()

    def _missing_in(self, asks: Mapping[int, Ask]) -> dict[int, str]:
        late = dict.fromkeys(self._lines, LATE)
        return {rank: why for rank, why in sorted((late | self._missing).items()) if rank not in asks}

    def _let_in(self) -> None:
        """Then the folder has served its purpose: a process that is killed later leaves nothing behind."""
        deadline = time.monotonic() + self._limit_s
        try:
            with self._door:
                sources = [self._door, self._ear]
                while self._missing and self._door in wait(sources, max(0.0, deadline - time.monotonic())):
                    visitor, _ = self._door.accept()
                    line = Connection(visitor.detach())
                    rank = line.recv()
                    self._lines[rank] = line
                    self._missing.pop(rank, None)
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _wait(self, lines: Iterable[Connection], until: float) -> list[Any]:
        """The lines on which something comes by then, or until the thread is to end; none if ``leave`` was called."""
        seconds = min(until, self._deadline) - time.monotonic()
        ready = wait([*lines, self._ear], None if seconds == math.inf else max(0.0, seconds))
        if self._ear in ready:
            self._ear.recv(64)
            if HOSTING_RANK in self._lines:
                self._leave(HOSTING_RANK)
            return []
        return ready

    def _gather(self) -> dict[int, Ask]:
        """What all ranks bring to their next step; less, once the first has waited long enough or nobody else is left;
        nothing when this is to end."""
        asks: dict[int, Ask] = {}
        start, limit_s, next_notice_s = 0.0, 0.0, 0.0
        while waiting := {line: rank for rank, line in self._lines.items() if rank not in asks}:
            ready = self._wait(waiting, start + min(limit_s, next_notice_s) if asks else math.inf)
            for rank, ask in self._take([(rank, line) for line, rank in waiting.items() if line in ready]):
                if ask.alone or not self._all_came:
                    self._tell(rank, self._serve({rank: ask}, {})[rank])
                    continue
                if not asks:
                    start, limit_s, next_notice_s = time.monotonic(), ask.limit_s, notice_seconds(ask.limit_s)
                asks[rank] = ask
            seconds = time.monotonic() - start
            if time.monotonic() >= self._deadline or (asks and seconds >= limit_s):
                break
            if asks and seconds >= next_notice_s and len(asks) < len(self._lines):
                next_notice_s *= 2
                self._notice(asks, seconds, limit_s)
        return dict(sorted(asks.items()))  # whoever came first: the same step is the same for the world

    def _take(self, lines: Sequence[tuple[int, Connection]]) -> Iterator[tuple[int, Ask]]:
        for rank, line in lines:
            try:
                ask = line.recv()
            except (EOFError, OSError):
                self._leave(rank)
                continue
            self._last[rank] = ask.text
            yield rank, ask

    def _tell(self, rank: int, answer: Any) -> None:
        try:
            if rank in self._lines:
                self._lines[rank].send(answer)
        except OSError:
            self._leave(rank)

    def _leave(self, rank: int) -> None:
        self._lines.pop(rank).close()
        self._missing[rank] = GONE

    def _notice(self, asks: Mapping[int, Ask], seconds: float, limit_s: float) -> None:
        absent = [f"rank {rank} (last seen in {self._last.get(rank, 'nothing')})" for rank in self._lines.keys() - asks]
        logger.warning(
            "ranks %s have waited %.1f s in %s for %s; they give up after %.1f s",
            *(sorted(asks), seconds, next(iter(asks.values())).text, ", ".join(absent), limit_s),
        )


_HOSTS: weakref.WeakSet[Host] = weakref.WeakSet()


@atexit.register
def _leave_peers() -> None:
    """This process ends, and the threads with it: peers that are still in a call get a moment, and another one for what
    is left of it to run without those that have not come."""
    hosts, deadline = list(_HOSTS), time.monotonic() + 2 * END_SECONDS
    for host in hosts:
        host.leave(END_SECONDS)
    for host in hosts:
        host.join(max(0.0, deadline - time.monotonic()))


class Line:
    """A rank's end of its connection with the host.

    Raises:
        EPError: the host has gone.
    """

    def __init__(self, address: str, rank: int) -> None:
        self._process = os.getpid()
        try:
            visitor = socket.socket(socket.AF_UNIX)
            visitor.connect(address)
            self._line = Connection(visitor.detach())
            self._line.send(rank)
        except OSError as error:
            raise EPError(self._gone("to connect")) from error

    def ask(self, ask: Ask) -> Any:
        """Bring something to a step, and wait for the answer: it comes, or the host has gone. Ctrl-C gets through.

        Raises:
            EPError: the host has gone.
        """
        try:
            self._line.send(ask)
            return self._line.recv()
        except (EOFError, OSError) as error:
            raise EPError(self._gone(f"in {ask.text}")) from error

    def close(self) -> None:
        """Hang up, also for forked children, which have the line open too; such a child only forgets it. Idempotent."""
        with contextlib.suppress(OSError):
            if os.getpid() == self._process:
                with socket.socket(fileno=os.dup(self._line.fileno())) as line:
                    line.shutdown(socket.SHUT_RDWR)
            self._line.close()

    @staticmethod
    def _gone(step: str) -> str:
        return (
            f"rank {HOSTING_RANK} of the group, which hosts the simulated ranks, {GONE}, while this one was {step}; "
            "build a new buffer"
        )
