"""Where the hosts of a group meet, to build a buffer together and to end it: through the store behind the group.

Torch's own collectives would do, but they wait as long as the group was told to, cannot say for whom, and leave a
broken group behind; and a buffer may outlive its group, but not the store.
"""

from __future__ import annotations

import logging
import pickle
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from deep_ep.errors import EPError, EPTimeoutError, WaitReport
from deep_ep.waiting import Watch

logger = logging.getLogger("deep_ep")

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """Seconds that a rank waits for its peers: its host, and its kernels."""

    host_s: float = 300.0
    kernel_s: float = 100.0


class Meeting:
    """The ranks of a group that build one buffer. Collective: it exists once all of them have come.

    Each rank lays down a name of this very attempt; rank 0 takes all names up and answers each by name with one
    session. So whoever gave up, or failed earlier, is in no session, and a later attempt finds nothing left of it.

    Args:
        group: or a subgroup; only its store is used.
        limits: how long to wait here and in every step.

    Raises:
        EPTimeoutError: naming the ranks that did not come.
        EPError: the store has gone.
    """

    def __init__(self, group: dist.ProcessGroup, limits: Limits) -> None:
        self.rank, self.num_ranks = group.rank(), group.size()
        self._store: Any = dist.PrefixStore("deep_ep", _store_of(group))  # type: ignore[attr-defined]
        self._limits = limits
        self._num_steps = 0
        self._name = uuid.uuid4().hex
        self._session = self._join()

    def _join(self) -> str:
        names = [f"join/{rank}" for rank in range(self.num_ranks)]
        self._call(lambda: self._store.set(names[self.rank], self._name))
        try:
            if self.rank == 0:
                self._await(names, "to build a buffer", self._limits.host_s)
                for name in names:
                    self._store.set(f"session/{self._store.get(name).decode()}", self._name)
                    self._store.delete_key(name)
            answer = f"session/{self._name}"
            self._await([answer], "to build a buffer", self._limits.host_s, watched=names)
        except BaseException:
            self._call(lambda: self._store.delete_key(names[self.rank]))
            raise
        session: str = self._call(lambda: self._store.get(answer)).decode()
        self._call(lambda: self._store.delete_key(answer))
        return session

    def all_gather(self, value: T, what: str, limit_s: float | None = None) -> list[T]:
        """Every rank's value, by rank. Collective.

        Args:
            value: anything that can be pickled.
            what: names the step, in an infinitive: "to allocate the window".
            limit_s: None is the host's.

        Raises:
            EPTimeoutError: naming the ranks that did not come.
            EPError: ranks are in different steps, or the store has gone.
        """
        keys = [f"{self._session}/{self._num_steps}/{rank}" for rank in range(self.num_ranks)]
        before = f"{self._session}/{self._num_steps - 1}/{self.rank}"
        self._num_steps += 1
        self._call(lambda: self._store.set(keys[self.rank], pickle.dumps((what, value))))
        self._await(keys, what, self._limits.host_s if limit_s is None else limit_s)
        said = [pickle.loads(self._call(lambda key=key: self._store.get(key))) for key in keys]  # type: ignore[misc]
        self._call(lambda: self._store.delete_key(before))  # all have read it, or they would not be here
        for rank, (step, _) in enumerate(said):
            if step != what:
                raise EPError(f"ranks are in different steps: rank {self.rank} came {what}, rank {rank} {step}")
        return [value for _, value in said]

    def _await(self, keys: list[str], what: str, limit_s: float, watched: list[str] | None = None) -> None:
        """Wait until all keys are there. ``watched`` are the keys, by rank, whose absence says who is missing."""

        seen: set[int] = set()  # who came, though some may have given up since

        def missing() -> list[int]:
            seen.update(rank for rank, key in enumerate(watched or keys) if self._there([key]))
            return [rank for rank in range(self.num_ranks) if rank not in seen]

        def notice(seconds: float) -> None:
            logger.warning(
                "rank %d has waited %.1f s for ranks %s %s; it gives up after %.1f s",
                *(self.rank, seconds, missing(), what, limit_s),
            )

        watch = Watch(limit_s, notice)
        while not self._there(keys):
            if watch.is_over:
                peers, seconds = missing(), watch.seconds
                whose = "; num_cpu_timeout_secs sets the limit" if limit_s == self._limits.host_s else ""
                raise EPTimeoutError(
                    f"rank {self.rank} waited {seconds:.1f} s for ranks {peers} of the group {what}; every rank must "
                    f"take part{whose}",
                    WaitReport(self.rank, what, tuple(peers), seconds),
                )
            watch.pause()

    def _there(self, keys: list[str]) -> bool:
        there: bool = self._call(lambda: self._store.check(keys))
        return there

    def _call(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except RuntimeError as error:  # torch's DistError among them
            raise EPError(
                f"rank {self.rank} cannot reach its peers: the store of the group has gone: {error}"
            ) from error


def _store_of(group: dist.ProcessGroup) -> Any:
    if hasattr(group, "get_group_store"):
        return group.get_group_store()
    return dist.distributed_c10d._get_process_group_store(group)
