"""The window's regions: what each rank keeps for its peers to write, where it lies and how large it is.

This is the one table. Kernels get its offsets as arguments (not as template parameters: a second buffer of another size
must not compile again), and deep_ep/include/deep_ep/wire/window.cuh says who writes which region.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

# The same numbers as in include/deep_ep/limits.cuh; a test compares them.
MAX_RANKS = 32
MAX_TOPK = 32
MAX_EXPERTS = 2048
MAX_TOKENS = 1 << 21  # of a rank in one call, less one
MAX_BLOCKS = 160

MAX_SCALES = 512  # scale factors of a token: they travel beside its row, and a stage has room for both

WINDOW_ALIGNMENT = 2 << 20  # bytes; a window is mapped in whole pages of 2 MiB
REGION_ALIGNMENT = 256  # bytes
CONTROL_BYTES = 256
GAVE_UP_OFFSET = 16  # in control: where kernels leave word that a wait has ended in vain
LINE_BYTES = 128  # of memory and of the link
SECTOR_BYTES = 32  # what memory writes at least
WORD_BYTES = 8  # value and epoch
MARK_BYTES = 4
PLAN_WORDS = 7  # what a source says that it calls
PLACE_WORDS = 2  # and where what it does not send lies
PARTIAL_WORDS = MAX_EXPERTS + MAX_RANKS  # of a block: what it counted
LABEL_BYTES = 16  # of a selection: its place and its weight, a word each
ARRIVED_SHARE = 128  # one part in so many of a window holds arrival marks, whatever the tokens; two hold routed words
LABELS_SHARE = 16  # and one in so many labels, if nobody has said how many tokens and selections there will be


def align(value: int, alignment: int) -> int:
    """The smallest multiple of ``alignment`` that is not below ``value``."""
    return -(-value // alignment) * alignment


@dataclass(frozen=True)
class Region:
    """One region of the window: its name, offset and size in bytes, and what it is for."""

    name: str
    offset: int
    num_bytes: int
    purpose: str


@dataclass(frozen=True)
class Record:
    """What travels for one token, in bytes: a row (a multiple of 16), then its tail (of 32). It fills whole lines. A
    dispatched token also has a label, which lies apart."""

    row_bytes: int
    tail_bytes: int

    @property
    def num_bytes(self) -> int:
        return align(self.row_bytes + self.tail_bytes, LINE_BYTES)

    @staticmethod
    def of_dispatch(row_bytes: int, num_scales: int = 0) -> Record:
        """Row; scale factors."""
        return Record(row_bytes, align(4 * num_scales, SECTOR_BYTES))

    @staticmethod
    def of_combine(row_bytes: int, num_topk: int) -> Record:
        """Row; weight of each selection."""
        return Record(row_bytes, align(4 * num_topk, SECTOR_BYTES))


@dataclass(frozen=True)
class WindowLayout:
    """The regions of a window of ``num_bytes`` that ``num_ranks`` ranks share, and registered memory behind them.

    Depends on nothing else, so every call of a buffer finds marks and words where earlier calls left them.
    """

    num_ranks: int
    num_bytes: int
    """Without registered memory."""
    regions: tuple[Region, ...]

    def digest(self) -> str:
        """Short, and the same only where every region lies at the same place."""
        places = [(region.name, region.offset, region.num_bytes) for region in self.regions]
        return hashlib.sha256(repr(places).encode()).hexdigest()[:12]

    def __getitem__(self, name: str) -> Region:
        return next(region for region in self.regions if region.name == name)

    @property
    def total_bytes(self) -> int:
        """With registered memory: what has to be allocated."""
        registered = self["registered"]
        return align(registered.offset + registered.num_bytes, WINDOW_ALIGNMENT)

    @property
    def slots_per_source(self) -> int:
        """Arrival marks, and routed words, that each source has: an upper limit of num_max_tokens_per_rank."""
        return self["arrived"].num_bytes // (MARK_BYTES * self.num_ranks)

    def fits(self, num_max_tokens: int, record: Record, rows_of_token: int | None = None, num_labels: int = 0) -> bool:
        """Whether there is room for the records of staged_bytes.

        Args:
            num_labels: selections of a token that is dispatched.
        """
        rows = staged_bytes(self.num_ranks, num_max_tokens, record, rows_of_token)
        labels = labels_bytes(self.num_ranks, num_max_tokens, num_labels)
        has_rooms = rows <= self["rows"].num_bytes and labels <= self["labels"].num_bytes
        return num_max_tokens <= self.slots_per_source and has_rooms


def staged_bytes(num_ranks: int, num_max_tokens: int, record: Record, rows_of_token: int | None = None) -> int:
    """Bytes of the records that may lie at a rank: one for each token of each peer; or, if a token's rows come home one
    by one, so many for each token of the rank itself, since one rank has each selection's expert."""
    records = (rows_of_token or num_ranks - 1) if num_ranks > 1 else 0
    return num_max_tokens * records * record.num_bytes


def labels_bytes(num_ranks: int, num_max_tokens: int, num_topk: int) -> int:
    """Bytes of the labels of all ranks' tokens."""
    return num_ranks * num_max_tokens * num_topk * LABEL_BYTES


def message_words(num_ranks: int) -> int:
    """8-byte words of what a source tells a peer: its tokens, what it calls, and a count for each expert."""
    return 1 + 2 * (PLAN_WORDS + PLACE_WORDS) + MAX_EXPERTS // num_ranks


def window_layout(
    num_ranks: int, num_bytes: int, num_label_bytes: int | None = None, num_registered_bytes: int = 0
) -> WindowLayout:
    """Divide a window.

    Args:
        num_label_bytes: of what labels take at most; None is a share of the window.
        num_registered_bytes: of the user's own tensors, behind all else.

    Raises:
        ValueError: it is too small, or not a multiple of 2 MiB.
    """
    if num_bytes % WINDOW_ALIGNMENT or num_bytes <= 0:
        raise ValueError(
            f"num_bytes must be a positive multiple of 2 MiB ({WINDOW_ALIGNMENT}), but it is {num_bytes}; "
            "ElasticBuffer.get_buffer_size_hint gives one that fits"
        )
    sizes = [
        ("control", CONTROL_BYTES, "epoch of the last operation, and who has read what"),
        ("partials", MAX_BLOCKS * PARTIAL_WORDS * WORD_BYTES, "what each block of this rank counted"),
        ("messages", num_ranks * message_words(num_ranks) * WORD_BYTES, "what each source calls and will send"),
        ("arrived", num_bytes // ARRIVED_SHARE, "a mark for each token that has come"),
        (
            "routed",
            num_bytes // ARRIVED_SHARE // MARK_BYTES * WORD_BYTES,
            "a word for each token of all ranks: its slot",
        ),
        (
            "labels",
            num_bytes // LABELS_SHARE if num_label_bytes is None else num_label_bytes,
            "places and weights of all ranks' selections",
        ),
    ]
    regions, offset = [], 0
    for name, size, purpose in sizes:
        regions.append(Region(name, offset, size, purpose))
        offset = align(offset + size, REGION_ALIGNMENT)
    if offset > num_bytes:
        raise ValueError(
            f"num_bytes must be at least {align(offset, WINDOW_ALIGNMENT)} for {num_ranks} ranks, but it is "
            f"{num_bytes}; ElasticBuffer.get_buffer_size_hint gives one that fits"
        )
    regions.append(Region("rows", offset, num_bytes - offset, "rows that have come from the peers"))
    regions.append(Region("registered", num_bytes, num_registered_bytes, "tensors that peers read in place"))
    return WindowLayout(num_ranks, num_bytes, tuple(regions))


def window_bytes(
    num_ranks: int,
    num_max_tokens: int,
    hidden: int,
    num_topk: int,
    allow_multiple_reduction: bool = True,
    *,
    sizes_are_told: bool = True,
) -> int:
    """The smallest window, in bytes, for dispatches and combines of these sizes.

    Combine returns bfloat16 rows whatever dispatch sent, and FP8 takes less: its rows are half as long, and their scale
    factors (one for every 128 values) far from the other half.

    Args:
        num_topk: selections of a token; 0 stands for "unknown", the largest.
        allow_multiple_reduction: False makes room for a record of each selection, as combine of expanded rows needs.
        sizes_are_told: who builds it knows them, and makes room for so many labels; else these get their share.
    """
    row_bytes, most_selections = align(2 * hidden, 16), num_topk or MAX_TOPK
    fixed = sum(
        align(size, REGION_ALIGNMENT)
        for size in (
            CONTROL_BYTES,
            MAX_BLOCKS * PARTIAL_WORDS * WORD_BYTES,
            num_ranks * message_words(num_ranks) * WORD_BYTES,
        )
    )
    records = (Record.of_dispatch(row_bytes), Record.of_combine(row_bytes, most_selections))
    rows = max(staged_bytes(num_ranks, num_max_tokens, record) for record in records)
    if not allow_multiple_reduction:
        every_row = staged_bytes(num_ranks, num_max_tokens, Record.of_combine(row_bytes, 1), most_selections)
        rows = max(rows, every_row)
    labels = align(labels_bytes(num_ranks, num_max_tokens, most_selections), REGION_ALIGNMENT)
    parts_left = ARRIVED_SHARE - 1 - WORD_BYTES // MARK_BYTES
    if not sizes_are_told:
        parts_left -= ARRIVED_SHARE // LABELS_SHARE
    by_rows = fixed + rows + (labels if sizes_are_told else 0) + 4 * REGION_ALIGNMENT
    by_shares = max(
        -(-by_rows * ARRIVED_SHARE // parts_left),
        num_max_tokens * num_ranks * MARK_BYTES * ARRIVED_SHARE,
        0 if sizes_are_told else labels * LABELS_SHARE,
    )
    return align(max(by_shares, WINDOW_ALIGNMENT), WINDOW_ALIGNMENT)
