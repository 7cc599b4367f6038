"""From shapes to launches: whatever a call may ask for fits into a block's shared memory, and rows are cut evenly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deep_ep import plan
from deep_ep.layout import MAX_EXPERTS, MAX_RANKS, MAX_SCALES, MAX_TOPK, Record
from deep_ep.plan import ROLES, CombineRoles, Crew, Roles, RolesOfMachine

SHARED_LIMIT = 232448  # bytes that a block has on sm_90 and sm_100, and in simulation
MACHINES = pytest.mark.parametrize("roles", ROLES.values(), ids=ROLES.keys())
ROWS = st.integers(1, 4096).map(lambda n: 16 * n)


@given(row_bytes=ROWS, limit=st.integers(1, 256).map(lambda n: 128 * n))
def test_cut(row_bytes: int, limit: int) -> None:
    """No piece is above the limit, none is empty, and no fewer pieces would do."""
    piece = plan.cut(row_bytes, limit)
    assert piece % plan.PIECE_ALIGNMENT == 0
    assert piece <= limit
    assert -(-row_bytes // piece) <= -(-row_bytes // limit)


@given(
    crew=st.builds(Crew, st.integers(1, 16), st.integers(2, 8), st.just(1)),
    memory=st.integers(16 << 10, SHARED_LIMIT),
    row_bytes=ROWS,
    tail_bytes=st.integers(0, 13).map(lambda n: 32 * n),
)
def test_ring(crew: Crew, memory: int, row_bytes: int, tail_bytes: int) -> None:
    """A ring holds what a stage must hold and fits, or says that it cannot."""
    stages = crew.num_warps * crew.num_stages
    try:
        ring = plan.ring(crew, memory, row_bytes, tail_bytes)
    except ValueError as error:
        assert f"{memory} bytes of shared memory do not hold {stages} stages" in str(error)  # noqa: PT017
        return
    assert ring.piece_bytes + tail_bytes <= ring.stage_bytes
    assert ring.stage_bytes % plan.PIECE_ALIGNMENT == 0
    assert stages * (ring.stage_bytes + plan.TICKET_BYTES + plan.MBARRIER_BYTES) <= ring.rings_bytes <= memory


@MACHINES
@given(
    row_bytes=ROWS,
    num_topk=st.integers(1, MAX_TOPK),
    num_ranks=st.integers(1, MAX_RANKS),
    local_experts=st.integers(1, MAX_EXPERTS),
    num_scales=st.integers(0, MAX_SCALES),
)
def test_every_dispatch_fits(
    roles: RolesOfMachine, row_bytes: int, num_topk: int, num_ranks: int, local_experts: int, num_scales: int
) -> None:
    num_experts = num_ranks * min(local_experts, MAX_EXPERTS // num_ranks)
    record = Record.of_dispatch(row_bytes, num_scales)
    launch = plan.plan_dispatch(roles.dispatch, record, num_topk, num_experts, num_ranks, SHARED_LIMIT)
    assert launch.tables_bytes == plan.tables_bytes(num_experts) + plan.mailboxes_bytes(roles.dispatch.send)
    assert launch.tables_bytes % 128 == 0
    beside = {"send": record.tail_bytes, "receive": record.tail_bytes + plan.KEPT_BYTES * num_topk}
    for name, ring in (("send", launch.send), ("receive", launch.receive)):
        assert ring.piece_bytes + beside[name] <= ring.stage_bytes
        assert launch.tables_bytes + ring.rings_bytes <= launch.shared_bytes <= SHARED_LIMIT


@MACHINES
@given(row_bytes=ROWS, num_topk=st.integers(1, MAX_TOPK))
def test_every_combine_fits(roles: RolesOfMachine, row_bytes: int, num_topk: int) -> None:
    record = Record.of_combine(row_bytes, num_topk)
    for division in (roles.combine, roles.combine_sums):
        ring = plan.plan_combine(division, record, SHARED_LIMIT)
        assert ring.piece_bytes + record.tail_bytes <= ring.stage_bytes
        assert plan.mailboxes_bytes(division.send) + ring.rings_bytes <= SHARED_LIMIT


@MACHINES
def test_roles_are_possible(roles: RolesOfMachine) -> None:
    for crew in (roles.dispatch.send, roles.dispatch.receive, roles.combine.send, roles.combine_sums.send):
        assert crew.num_warps >= 1
        assert 0 <= crew.num_storing < crew.num_stages, "or a warp could never load"
    assert roles.dispatch.num_threads <= 1024
    for division in (roles.combine, roles.combine_sums):
        assert division.num_threads <= 1024
        beside = 2 if division.heralds else 1
        assert beside * division.send.num_warps < division.num_warps, "where every block sends, some of its warps add"


@given(
    roles=st.sampled_from([machine.dispatch for machine in ROLES.values()]),
    num_blocks=st.integers(2, 160),
    num_tokens=st.integers(0, 1 << 16),
    num_ranks=st.integers(1, MAX_RANKS),
    num_topk=st.integers(1, MAX_TOPK),
    expand=st.booleans(),
)
def test_every_team_has_blocks(
    roles: Roles, num_blocks: int, num_tokens: int, num_ranks: int, num_topk: int, expand: bool
) -> None:
    """At least one sends, one receives and one counts, and in a whole launch those who count do not send."""
    traffic = plan.Traffic.of(num_ranks, num_topk, expand)
    known, whole = (roles.division(num_blocks, num_tokens, traffic, by_handle) for by_handle in (True, False))
    for each in (known, whole):
        assert 1 <= each.num_send_blocks <= each.first_count_block <= num_blocks - 1
        assert each.num_send_blocks + each.num_receive_blocks == each.num_blocks == num_blocks


@given(
    roles=st.sampled_from([machine.dispatch for machine in ROLES.values()]),
    num_blocks=st.integers(1, 160),
    num_tokens=st.integers(0, 1 << 16),
)
def test_in_place_nobody_sends(roles: Roles, num_blocks: int, num_tokens: int) -> None:
    whole = roles.division_in_place(num_blocks, num_tokens)
    assert (whole.num_send_blocks, whole.num_receive_blocks) == (0, num_blocks)
    assert 0 <= whole.first_count_block < num_blocks


@given(num_ranks=st.integers(1, MAX_RANKS), num_topk=st.integers(1, MAX_TOPK))
def test_traffic(num_ranks: int, num_topk: int) -> None:
    """All selections together have as many places as there are selections."""
    plain, expanded = (plan.Traffic.of(num_ranks, num_topk, expand) for expand in (False, True))
    assert plain.places == 1.0
    assert (expanded.sent + expanded.kept) * expanded.places == pytest.approx(num_topk)
    assert expanded.places >= 1 - 1e-9


@given(send_share=st.floats(0, 1), num_blocks=st.integers(1, 160))
def test_some_block_sends(send_share: float, num_blocks: int) -> None:
    roles = CombineRoles(Crew(1, 2, 1), num_warps=2, send_share=send_share, heralds=False)
    assert 1 <= roles.num_send_blocks(num_blocks) <= num_blocks
