"""From shapes to launches: which warps do what, how rows are cut into pieces. Pure and cheap.

docs/protocol.md derives the numbers; docs/performance.md holds what was measured; sm_model.py says how many SMs.
"""

from __future__ import annotations

from dataclasses import dataclass

from deep_ep.layout import MAX_RANKS, Record, align

TICKET_BYTES = 32  # what a ring remembers of a piece (include/deep_ep/phases/ring.cuh)
MBARRIER_BYTES = 8
KEPT_BYTES = 4  # what a stage keeps of each selection: its place (include/deep_ep/phases/copy_out.cuh)
MAILBOX_BYTES = 160  # what a sending warp hands to its herald (include/deep_ep/phases/announce.cuh)
PIECE_ALIGNMENT = 128  # bytes; whole lines of memory and of the link


@dataclass(frozen=True)
class Crew:
    """Warps of a block that do one thing, each with a ring of stages of which some may be storing while others load."""

    num_warps: int
    num_stages: int
    num_storing: int
    """0: the one stage is filled anew when it has been stored."""


@dataclass(frozen=True)
class Division:
    """Who does what in one launch of a dispatch."""

    num_blocks: int
    num_send_blocks: int
    """The first ones."""
    num_receive_blocks: int
    """Those behind them."""
    first_count_block: int
    """It and all behind it count before they do anything else."""

    @property
    def without_receivers(self) -> Division:
        """Those who send, and those who count, which do nothing else."""
        if self.num_receive_blocks == 0:
            return self
        num_counters = self.num_blocks - self.first_count_block
        return Division(self.num_send_blocks + num_counters, self.num_send_blocks, 0, self.num_send_blocks)

    @staticmethod
    def receiving(num_blocks: int) -> Division:
        """A launch in which all blocks receive."""
        return Division(num_blocks, 0, num_blocks, num_blocks)


ONE_BLOCK = Division(1, 1, 0, 0), Division.receiving(1)
"""Two launches: the block counts, and sends; then it receives."""


@dataclass(frozen=True)
class Roles:
    """What a kernel is compiled for, and how its launches divide their blocks."""

    send: Crew
    receive: Crew
    send_cost: float
    """SM time of a byte that is sent, over that of a byte that is copied out in the plain layout."""
    known_send_cost: float
    """The same with a handle: receivers need not wait until places are known, and so have more time."""
    expanded_send_cost: float
    """The same where rows go to several places."""
    tokens_per_counter: int
    """Of a rank's tokens, those that one block counts, while there are blocks."""

    @property
    def num_threads(self) -> int:
        # A herald for each warp that sends; beside those that receive, at least one that lands what comes with rows.
        return 32 * max(2 * self.send.num_warps, self.receive.num_warps + 1)

    def num_send_blocks(self, num_blocks: int, traffic: Traffic, by_handle: bool) -> int:
        """Blocks are divided as the bytes that they write. At least one sends and one receives."""
        plain_cost = self.known_send_cost if by_handle else self.send_cost
        sent = traffic.sent * (plain_cost if traffic.places == 1.0 else self.expanded_send_cost)
        share = sent / (sent + (traffic.sent + traffic.kept) * traffic.places)
        return min(max(1, round(num_blocks * share)), num_blocks - 1)

    def division(self, num_blocks: int, num_tokens: int, traffic: Traffic, by_handle: bool) -> Division:
        """A launch that sends and receives."""
        num_send_blocks = self.num_send_blocks(num_blocks, traffic, by_handle)
        num_counters = max(1, -(-num_tokens // self.tokens_per_counter))
        return Division(
            num_blocks, num_send_blocks, num_blocks - num_send_blocks, max(num_send_blocks, num_blocks - num_counters)
        )

    def division_in_place(self, num_blocks: int, num_tokens: int) -> Division:
        """A launch in which nobody sends, and all receive."""
        num_counters = max(1, -(-num_tokens // self.tokens_per_counter))
        return Division(num_blocks, 0, num_blocks, max(0, num_blocks - num_counters))


@dataclass(frozen=True)
class Traffic:
    """What becomes of a rank's tokens, if experts are drawn evenly: rows sent and rows kept for each token, and the
    places of each row that is received."""

    sent: float
    kept: float
    places: float

    @staticmethod
    def of(num_ranks: int, num_topk: int, expand: bool) -> Traffic:
        reached = 1 - (1 - 1 / num_ranks) ** num_topk  # the chance that a token goes to a certain rank
        return Traffic((num_ranks - 1) * reached, reached, num_topk / num_ranks / reached if expand else 1.0)


@dataclass(frozen=True)
class CombineRoles:
    """What the combine kernel is compiled for. Its blocks send with a crew of warps, and add with all others."""

    send: Crew
    num_warps: int
    """Of a block, those that send included, and as many heralds if there are any."""
    send_share: float
    """Of a launch's blocks, the part that has a crew; in the other blocks all warps add."""
    heralds: bool
    """Whether others announce what the crew sends, or the crew itself, which costs it time and the block no warps."""

    @property
    def num_threads(self) -> int:
        return 32 * self.num_warps

    def num_send_blocks(self, num_blocks: int) -> int:
        """Those in which some warps send; all others add. At least one block sends."""
        return min(max(1, round(num_blocks * self.send_share)), num_blocks)


@dataclass(frozen=True)
class RolesOfMachine:
    """The roles of every launch on one kind of machine."""

    dispatch: Roles
    combine: CombineRoles
    """Where senders copy rows."""
    combine_sums: CombineRoles
    """Where senders add rows first."""
    warps_in_place: int
    """Of a block of a combine in which nobody sends."""


# A GPU hides latency with many warps and large pieces; the simulator pays for each thread.
ROLES = {
    "cuda": RolesOfMachine(
        dispatch=Roles(
            send=Crew(9, 3, 1),
            receive=Crew(9, 3, 1),
            send_cost=1.0,
            known_send_cost=1.15,
            expanded_send_cost=1.6,
            tokens_per_counter=256,
        ),
        combine=CombineRoles(send=Crew(2, 6, 1), num_warps=20, send_share=1.0, heralds=True),
        combine_sums=CombineRoles(send=Crew(6, 2, 1), num_warps=12, send_share=1.0, heralds=False),
        warps_in_place=12,
    ),
    "simulated": RolesOfMachine(
        dispatch=Roles(
            send=Crew(1, 3, 2),
            receive=Crew(2, 2, 1),
            send_cost=1.25,
            known_send_cost=1.25,
            expanded_send_cost=1.6,
            tokens_per_counter=8,
        ),
        combine=CombineRoles(send=Crew(1, 3, 2), num_warps=4, send_share=1.0, heralds=True),
        combine_sums=CombineRoles(send=Crew(1, 3, 2), num_warps=3, send_share=1.0, heralds=False),
        warps_in_place=3,
    ),
}


def mailboxes_bytes(crew: Crew) -> int:
    """Bytes of a sending block's mailboxes, as Mailbox::bytes in include/deep_ep/phases/announce.cuh."""
    return align(crew.num_warps * MAILBOX_BYTES, 128)


def tables_bytes(num_experts: int) -> int:
    """Bytes of a dispatch block's tables, as Tables::bytes in include/deep_ep/phases/tables.cuh."""
    words = 4 + 4 * num_experts + 4 * MAX_RANKS + 4 + 4 * MAX_RANKS
    return align(4 * words, 128)


@dataclass(frozen=True)
class Ring:
    """How one crew cuts its rows, in bytes."""

    piece_bytes: int
    stage_bytes: int
    rings_bytes: int
    """Of all the crew's rings."""


def cut(row_bytes: int, limit: int) -> int:
    """The size of the equal pieces that make a row, none above ``limit`` bytes (the last one may be smaller)."""
    pieces = -(-row_bytes // limit)
    return align(-(-row_bytes // pieces), PIECE_ALIGNMENT)


def ring(crew: Crew, memory: int, row_bytes: int, tail_bytes: int) -> Ring:
    """Cut rows so that the crew's rings fit.

    Args:
        memory: bytes of shared memory that the rings may take.
        tail_bytes: what a stage holds beside the last piece.

    Raises:
        ValueError: not even small stages fit.
    """
    stages = crew.num_warps * crew.num_stages
    largest = (memory - PIECE_ALIGNMENT) // stages - TICKET_BYTES - MBARRIER_BYTES
    limit = largest - largest % PIECE_ALIGNMENT - align(tail_bytes, PIECE_ALIGNMENT)
    if limit <= 0:
        raise ValueError(f"{memory} bytes of shared memory do not hold {stages} stages")
    piece = cut(row_bytes, limit)
    stage = align(piece + tail_bytes, PIECE_ALIGNMENT)
    return Ring(piece, stage, align(stages * (stage + TICKET_BYTES + MBARRIER_BYTES), PIECE_ALIGNMENT))


@dataclass(frozen=True)
class LaunchPlan:
    """Shared memory of a launch, in bytes: tables and mailboxes first, then the rings of the block's crew."""

    send: Ring
    receive: Ring
    tables_bytes: int
    shared_bytes: int


def plan_dispatch(
    roles: Roles, record: Record, num_topk: int, num_experts: int, num_ranks: int, shared_limit: int
) -> LaunchPlan:
    """The plan of a dispatch launch on a machine whose blocks have ``shared_limit`` bytes."""
    tables = tables_bytes(num_experts) + mailboxes_bytes(roles.send)
    send = ring(roles.send, shared_limit - tables, record.row_bytes, record.tail_bytes)
    beside = record.tail_bytes + KEPT_BYTES * num_topk
    receive = ring(roles.receive, shared_limit - tables, record.row_bytes, beside)
    # Before the rings are used, their memory holds what each warp counts (WarpCounts in phases/count.cuh).
    counts = num_count_warps(roles, num_experts, num_ranks, shared_limit) * warp_counts_bytes(num_experts)
    return LaunchPlan(send, receive, tables, tables + max(send.rings_bytes, receive.rings_bytes, counts))


def warp_counts_bytes(num_experts: int) -> int:
    """Bytes in which one warp counts, as WarpCounts::stride in include/deep_ep/phases/count.cuh."""
    return 4 * (num_experts + MAX_RANKS + 32 * MAX_RANKS)


def num_count_warps(roles: Roles, num_experts: int, num_ranks: int, shared_limit: int) -> int:
    """Warps of a dispatch block that count tokens: all but one, or as many as have room for their counts."""
    room = (shared_limit - tables_bytes(num_experts) - mailboxes_bytes(roles.send)) // warp_counts_bytes(num_experts)
    return min(roles.num_threads // 32 - 1, room)


def plan_combine(roles: CombineRoles, record: Record, shared_limit: int) -> Ring:
    """How a combine launch cuts its rows. Its shared memory holds mailboxes, and then the rings of the senders."""
    memory = shared_limit - mailboxes_bytes(roles.send)
    return ring(roles.send, memory, record.row_bytes, record.tail_bytes)


def expanded_rows_at_most(max_tokens: int, num_ranks: int, num_topk: int, local_experts: int, alignment: int) -> int:
    """Rows of the expanded layout when every rank sends all it may, to as many experts here as a token can select."""
    rows = num_ranks * max_tokens * min(num_topk, local_experts) + (alignment - 1) * local_experts
    return align(rows, alignment)


def theoretical_num_qps(num_sms: int) -> int:
    """Queue pairs of the network that a call of ``num_sms`` SMs uses: none, since ranks share one NVLink domain."""
    return 0
