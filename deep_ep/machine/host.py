"""One rank hosts what all of them share: a thread that takes what each rank's step brings, and serves them together.

Ranks are processes of one machine, so they come through a socket in a folder that only this user can enter. A rank
that dies is noticed at once, one that does not come when the limit of those who came has passed; then those are served
alone, and nobody waits for anybody any more.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from deep_ep.errors import EPError
from deep_ep.waiting import notice_seconds

logger = logging.getLogger("deep_ep")

END_SECONDS = 5.0  # how long a thread that is told to end may take


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


Serve = Callable[[Mapping[int, Ask], Sequence[int]], Mapping[int, Any]]


class Host:
    """The thread. ``serve`` runs in it: it takes the asks of those who came, by rank, and the ranks that did not, and
    returns an answer for each of the former; it must not raise."""

    def __init__(self, num_ranks: int, serve: Serve, limit_s: float) -> None:
        self._serve = serve
        self._limit_s = limit_s  # for the ranks to connect
        self._missing = set(range(num_ranks))  # that have left, or have not connected yet
        self._lines: dict[int, Connection] = {}
        self._last: dict[int, str] = {}  # each rank's last step
        self._all_came = True  # to every step so far
        self._folder = tempfile.mkdtemp(prefix="deep_ep-")
        self.address = os.path.join(self._folder, "host")
        self._door = socket.socket(socket.AF_UNIX)
        self._door.bind(self.address)
        self._door.listen(num_ranks)
        self._end, self._ended = os.pipe()
        self._thread = threading.Thread(target=self._run, name="deep_ep host", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hang up. Idempotent."""
        if self._ended >= 0:
            os.close(self._ended)  # wakes the thread
            self._ended = -1
            if threading.current_thread() is not self._thread:
                self._thread.join(END_SECONDS)
            shutil.rmtree(self._folder, ignore_errors=True)

    def _run(self) -> None:
        try:
            self._let_in()
            while asks := self._gather():
                missing = sorted(self._missing | (self._lines.keys() - asks.keys()))
                answers, self._all_came = self._serve(asks, missing), not missing
                for rank, answer in answers.items():
                    self._tell(rank, answer)
        finally:
            for line in self._lines.values():
                line.close()
            os.close(self._end)

    def _let_in(self) -> None:
        deadline = time.monotonic() + self._limit_s
        with self._door:
            while self._missing and self._door in wait([self._door, self._end], max(0.0, deadline - time.monotonic())):
                visitor, _ = self._door.accept()
                line = Connection(visitor.detach())
                rank = line.recv()
                self._lines[rank] = line
                self._missing.discard(rank)

    def _gather(self) -> dict[int, Ask]:
        """What all ranks bring to their next step; less, once the first has waited long enough or nobody else is left;
        nothing when this is to end."""
        asks: dict[int, Ask] = {}
        start, limit_s, next_notice_s = 0.0, 0.0, 0.0
        while waiting := {line: rank for rank, line in self._lines.items() if rank not in asks}:
            patience_s = min(limit_s, next_notice_s) - (time.monotonic() - start) if asks else None
            ready = wait([*waiting, self._end], None if patience_s is None else max(0.0, patience_s))
            if self._end in ready:
                return {}
            for rank, ask in self._take([(rank, line) for line, rank in waiting.items() if line in ready]):
                if ask.alone or not self._all_came:
                    self._tell(rank, self._serve({rank: ask}, ())[rank])
                    continue
                if not asks:
                    start, limit_s, next_notice_s = time.monotonic(), ask.limit_s, notice_seconds(ask.limit_s)
                asks[rank] = ask
            seconds = time.monotonic() - start
            if asks and seconds >= limit_s:
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
            self._lines[rank].send(answer)
        except OSError:
            self._leave(rank)

    def _leave(self, rank: int) -> None:
        self._lines.pop(rank).close()
        self._missing.add(rank)

    def _notice(self, asks: Mapping[int, Ask], seconds: float, limit_s: float) -> None:
        absent = [f"rank {rank} (last seen in {self._last.get(rank, 'nothing')})" for rank in self._lines.keys() - asks]
        logger.warning(
            "ranks %s have waited %.1f s in %s for %s; they give up after %.1f s",
            *(sorted(asks), seconds, next(iter(asks.values())).text, ", ".join(absent), limit_s),
        )


class Line:
    """A rank's end of its connection with the host."""

    def __init__(self, address: str, rank: int) -> None:
        visitor = socket.socket(socket.AF_UNIX)
        visitor.connect(address)
        self._line = Connection(visitor.detach())
        self._line.send(rank)

    def ask(self, ask: Ask) -> Any:
        """Bring something to a step, and wait for the answer: it comes, or the host has gone. Ctrl-C gets through.

        Raises:
            EPError: the host has gone.
        """
        try:
            self._line.send(ask)
            return self._line.recv()
        except (EOFError, OSError) as error:
            raise EPError(
                f"the rank that hosts the simulated ranks has left while this one was in {ask.text}"
            ) from error

    def close(self) -> None:
        """Hang up. Idempotent."""
        with contextlib.suppress(OSError):
            self._line.close()
