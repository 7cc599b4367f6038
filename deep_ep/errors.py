"""Every exception of this library that is not a plain ValueError or TypeError.

A wrong argument is a ``ValueError`` or ``TypeError``, raised before anything is launched. The classes below are for the
world around the call: peers, compilers, installations and machines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


class EPError(RuntimeError):
    """The root of this library's own errors."""


@dataclass(frozen=True)
class WaitReport:
    """One rank's wait for others: what a program, rather than a person, wants to know of it.

    Attributes:
        rank: who waited.
        phase: in which phase of a kernel ("collect"), or at what a host did so ("to build a buffer").
        peers: for which ranks.
        seconds: how long.
        counters: what was expected and what was seen, by name; empty for a host.
    """

    rank: int
    phase: str
    peers: tuple[int, ...]
    seconds: float
    counters: Mapping[str, int] = field(default_factory=dict)


class EPTimeoutError(EPError):
    """A rank waited longer than it was allowed to for something that a peer, or a kernel, had to do.

    Attributes:
        report: the same in parts, where it is known.
    """

    def __init__(self, text: str, report: WaitReport | None = None) -> None:
        super().__init__(text)
        self.report = report


class EPTopologyError(EPError):
    """The ranks of the group do not reach each other in a way that this version's kernels can use."""


class EPEnvironmentError(EPError):
    """Something on this host is missing, too old or contradictory; the message holds the line that mends it."""


class EPCompileError(EPError):
    """A kernel did not compile.

    Attributes:
        command: the compiler's command line, or the options given to an in-process compiler.
        log: everything the compiler said.
        folder: where source, command and log were kept, or None when no folder could be written.
    """

    def __init__(self, what: str, command: str, log: str, folder: Path | None) -> None:
        tail = "\n".join(log.strip().splitlines()[-20:])
        kept = f"source, command and log are in {folder}" if folder else "no folder could be written for source and log"
        super().__init__(f"{what} did not compile.\ncommand: {command}\nlast lines of the log:\n{tail}\n{kept}")
        self.command = command
        self.log = log
        self.folder = folder
