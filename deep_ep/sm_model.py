"""How many SMs a call takes that is told none: the fewest that keep busy what limits it, the link or the memory. Pure.

By what was measured (docs/performance.md, "How many SMs"), the time of a call with n SMs is

    fixed + max(work / n, bytes on the link / the link's speed, bytes of memory / the memory's speed)

so it gains nothing from more SMs than work over the greater of the other two, but that near the memory's limit times
bend slowly: there calls take up to a fifth more. All of them grow with the number of bytes on the link, and with
nothing else that a call brings, so the number is one for all sizes of batches and all formats of rows; but most calls
of few tokens take more (``of_few``). An SM loads and stores one after the other (docs/experiments.md, note 24), so its
work is the sum of both.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from deep_ep.layout import MAX_TOPK, align
from deep_ep.plan import Traffic

# One H200 to another, in one direction: what kernels reach, and which part that is of the wire.
NVLINK_GBS = 365.0
NVLINK_REACHED = NVLINK_GBS / (18 * 26.5625)
# An H200's memory, what is read and what is written together: what a copy reaches, and which part that is of 6144 bits
# at 2 x 3201 MHz.
MEMORY_GBS = 4248.0
MEMORY_REACHED = MEMORY_GBS / 4916.7
# SMs wait longer for a slower memory, long before it is the limit: on H100, with 0.68 of it, calls that SMs limit take
# 0 to 8% more. The law goes through these two; nobody has measured a faster memory, which changes nothing.
MEMORY_EXPONENT = 0.15
# Where memory is the limit, times still fall by 2 to 5% up to here, and differ less from run to run than at the bend.
BEYOND_THE_BEND = 1.2

VERY_FEW_TOKENS, FEW_TOKENS = 32, 512

NOMINAL_SM_READ_GBS, NOMINAL_SM_WRITE_GBS = 200.0, 50.0  # the public interface's, of an SM that does both at a time


class Kind(enum.Enum):
    """Calls that differ in what SMs do for a byte on the link. A dispatch by a handle does what any other does."""

    DISPATCH = "dispatch"
    EXPANDED_DISPATCH = "expanded dispatch"
    DISPATCH_IN_PLACE = "dispatch of rows that peers read in place"
    EXPANDED_DISPATCH_IN_PLACE = "expanded dispatch of such rows"
    COMBINE = "combine"
    COMBINE_IN_PLACE = "combine of rows that peers read in place"
    COMBINE_OF_SUMS = "combine of expanded rows, added on their rank first"
    COMBINE_OF_EVERY_ROW = "combine of expanded rows, one by one"


FEW_TOKENS_SMS = {
    Kind.DISPATCH: 80,
    Kind.EXPANDED_DISPATCH: 80,
    Kind.COMBINE: 32,
    Kind.COMBINE_IN_PLACE: 32,
    Kind.COMBINE_OF_SUMS: 64,
}
EXPANDED = (Kind.EXPANDED_DISPATCH, Kind.EXPANDED_DISPATCH_IN_PLACE)
DISPATCHES = (Kind.DISPATCH, Kind.DISPATCH_IN_PLACE, *EXPANDED)
IN_PLACE = (Kind.DISPATCH_IN_PLACE, Kind.EXPANDED_DISPATCH_IN_PLACE, Kind.COMBINE_IN_PLACE)


@dataclass(frozen=True)
class Speeds:
    """GB/s: of the link and the memory what kernels reach, of one SM what it reaches while it does nothing else. The
    latter were fitted to the sweeps in tests/unit/test_sm_model.py."""

    link: float = NVLINK_GBS
    """Of one GPU, in one direction."""
    memory: float = MEMORY_GBS
    load: float = 150.0
    store: float = 55.0
    add: float = 97.0
    """Loads of expanded rows that are added before they travel: by threads, many rows at once."""
    fetch: float = 33.0
    """Loads of peers' rows that are added: by threads too, which wait for the link."""

    @staticmethod
    def of(nvlink_gbs: float | None, wire_gbs: float | None, memory_gbs: float | None) -> Speeds:
        """Of a machine; an H200's where nothing is known.

        Args:
            nvlink_gbs: what kernels reach over one GPU's links in one direction, if somebody has said so.
            wire_gbs, memory_gbs: what those links and the memory are made for.
        """
        link = nvlink_gbs or (wire_gbs * NVLINK_REACHED if wire_gbs else NVLINK_GBS)
        memory = memory_gbs * MEMORY_REACHED if memory_gbs else MEMORY_GBS
        return Speeds(link, memory)._of_sm(min(1.0, (memory / MEMORY_GBS) ** MEMORY_EXPONENT))

    def _of_sm(self, loads: float, stores: float | None = None) -> Speeds:
        """These, with those of an SM multiplied."""
        return replace(
            self,
            load=self.load * loads,
            store=self.store * (loads if stores is None else stores),
            add=self.add * loads,
            fetch=self.fetch * loads,
        )

    def as_told(self, nvlink_gbs: float, sm_read_gbs: float, sm_write_gbs: float) -> Speeds:
        """These, but for what a caller of get_theoretical_num_sms knows better; a link of 0 GB/s is not known.

        What is said of an SM is in proportion to what the interface takes for granted, of SMs as they were measured.
        """
        told = self._of_sm(sm_read_gbs / NOMINAL_SM_READ_GBS, sm_write_gbs / NOMINAL_SM_WRITE_GBS)
        return replace(told, link=nvlink_gbs or self.link)


class Work(NamedTuple):
    """Bytes for each byte that a rank sends over its link, if experts are drawn evenly. A rank that is alone sends
    none; then for each byte of its tokens."""

    loaded: float
    fetched: float
    added: float
    stored: float
    memory: float
    """Of this rank's memory, in both directions: all these, but for rows from peers, which are loaded while the cache
    still has them. What SMs store at peers, peers store here."""

    def sm_seconds(self, speeds: Speeds) -> float:
        """Of one SM, for a GB on the link."""
        loads = self.loaded / speeds.load + self.fetched / speeds.fetch + self.added / speeds.add
        return loads + self.stored / speeds.store


def work_of(kind: Kind, num_ranks: int, num_topk: int) -> Work:
    """What each kind of call loads and stores (docs/protocol.md says why), rows and no more.

    Dispatch: a row for a peer is loaded, and stored there. A row that has come, or that stays, is loaded once and
    stored at each of its places: one, or in the expanded layout one for each selection of an expert here.

    Combine: a row for a peer is loaded, and stored there. Rows that have come, and own ones, are loaded and added, and
    each token's sum is stored. Of sums, all expanded rows are loaded before anything travels; only what has come is
    loaded after that.

    In place nothing is sent: what has come is loaded, or fetched to be added, from the peer instead.

    With 2 ranks and 8 selections a dispatch loads 3 bytes and stores 3 (expanded 9), combine loads 3 (of sums 9, and 8
    of them are added) and stores 2.
    """
    traffic = Traffic.of(num_ranks, num_topk, expand=kind in EXPANDED)
    if kind is Kind.COMBINE_OF_EVERY_ROW:
        traffic = Traffic(sent=num_topk * (num_ranks - 1) / num_ranks, kept=num_topk / num_ranks, places=1.0)
    unit, sent = (traffic.sent, 1) if num_ranks > 1 else (traffic.kept, 0)
    pushed = 0 if kind in IN_PLACE else sent
    received = (traffic.sent + traffic.kept) / unit
    loaded, fetched, added, stored = pushed + received, 0.0, 0.0, pushed + 1 / unit
    if kind in DISPATCHES:
        stored = pushed + received * traffic.places
    elif kind is Kind.COMBINE_OF_SUMS:
        loaded, added = sent, num_topk / unit
    elif kind is Kind.COMBINE_IN_PLACE:
        loaded, fetched = received - sent, sent
    return Work(loaded, fetched, added, stored, memory=loaded + fetched + added + stored - pushed)


def num_sms(kind: Kind, num_ranks: int, num_topk: int, speeds: Speeds) -> int:
    """SMs with which the link becomes the limit, but no more than a fifth beyond those with which the memory does.

    Args:
        num_ranks: of the NVLink domain.
        num_topk: selections of a token, at least 1; a dispatch of plain rows takes as many SMs for any number.

    Returns:
        an even number, at least 4, whatever a device has.
    """
    work = work_of(kind, num_ranks, num_topk)
    link_gbs = min(speeds.link, BEYOND_THE_BEND * speeds.memory / work.memory)
    return max(4, align(math.ceil(link_gbs * work.sm_seconds(speeds)), 2))


def of_few(kind: Kind, num_tokens: int) -> int:
    """SMs that a call takes at least for so few tokens: it is then limited by trips to memory, of which a warp makes as
    many, one after the other, as it has rows to copy, pieces of rows to add, and rows in a sum. With very few tokens no
    warp has two. Measured with up to 512 tokens (docs/performance.md, "How many SMs", "Few tokens")."""
    return FEW_TOKENS_SMS.get(kind, 0) if VERY_FEW_TOKENS < num_tokens <= FEW_TOKENS else 0


def table(num_ranks: int, speeds: Speeds, most: int) -> dict[Kind, tuple[int, ...]]:
    """Of every kind, what calls take by their number of selections, from 0 (which no call has) on.

    Args:
        most: what a call can use on this device.
    """
    topks = [max(1, num_topk) for num_topk in range(MAX_TOPK + 1)]
    return {kind: tuple(min(num_sms(kind, num_ranks, topk, speeds), most) for topk in topks) for kind in Kind}
