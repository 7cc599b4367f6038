"""Numbers that Python and the headers both hold are the same: limits, and the sizes of what lies in memory."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from deep_ep import layout, plan
from deep_ep.calls.agreement import MOST_NUMBERS
from deep_ep.errors import EPCompileError
from deep_ep.jit import Gxx, Nvrtc, Store, Toolchain, build_files
from deep_ep.ops.arguments import FaultRecord, Window
from deep_ep.plan import ROLES, Crew


def ring_asserts(crew: Crew) -> str:
    """A ring's size for one stage size, as plan.ring counts it."""
    stages, stage_bytes = crew.num_warps * crew.num_stages, 1024
    num_bytes = layout.align(stages * (stage_bytes + plan.TICKET_BYTES + plan.MBARRIER_BYTES), plan.PIECE_ALIGNMENT)
    ring = f"Ring<{crew.num_stages}, {crew.num_storing}>"
    return f"static_assert({ring}::bytes({crew.num_warps}, {stage_bytes}) == {num_bytes});"


# Experts and ranks.
TABLES = [8, 30, 256, layout.MAX_EXPERTS]
CREWS = {
    crew
    for machine in ROLES.values()
    for crew in (machine.dispatch.send, machine.dispatch.receive, machine.combine.send, machine.combine_sums.send)
}
SOURCE = f"""
#include <deep_ep/kernels/barrier.cuh>
#include <deep_ep/kernels/combine.cuh>
#include <deep_ep/kernels/dispatch.cuh>

namespace deep_ep {{
static_assert(kMaxRanks == {layout.MAX_RANKS});
static_assert(kMaxTopk == {layout.MAX_TOPK});
static_assert(kMaxExperts == {layout.MAX_EXPERTS});
static_assert(kMaxBlocks == {layout.MAX_BLOCKS});
static_assert(kPartialWords == {layout.PARTIAL_WORDS});

static_assert(sizeof(Control) <= {layout.CONTROL_BYTES});
static_assert(EP_OFFSET(Control, gave_up) == {layout.GAVE_UP_OFFSET});
static_assert(sizeof(Window) == {ctypes.sizeof(Window)});
static_assert(message_word::kExperts == {layout.message_words(1) - layout.MAX_EXPERTS});
static_assert(message_word::kPlanWords == {layout.PLAN_WORDS});
static_assert(1ull << (32 - kEpochBits) == {MOST_NUMBERS});
static_assert(sizeof(device::FaultRecord) == {ctypes.sizeof(FaultRecord)});

static_assert(sizeof(Ticket) == {plan.TICKET_BYTES});
static_assert(sizeof(device::Mbarrier) == {plan.MBARRIER_BYTES});
{chr(10).join(f"static_assert(Tables::bytes({e}) == {plan.tables_bytes(e)});" for e in TABLES)}
{chr(10).join(sorted(map(ring_asserts, CREWS)))}
}}  // namespace deep_ep
"""


@pytest.mark.parametrize("toolchain", [Gxx(), Nvrtc("sm_90a")], ids=["simulated", "sm_90a"])
def test_headers_and_python_agree(toolchain: Toolchain, tmp_path: Path) -> None:
    """The source above compiles; a number that differs is named by the compiler."""
    build_files("limits", {toolchain.source_name: SOURCE}, toolchain, store=Store(tmp_path))


@pytest.mark.parametrize("toolchain", [Gxx(), Nvrtc("sm_90a")], ids=["simulated", "sm_90a"])
def test_a_difference_is_seen(toolchain: Toolchain, tmp_path: Path) -> None:
    wrong = SOURCE.replace(f"sizeof(Ticket) == {plan.TICKET_BYTES}", f"sizeof(Ticket) == {plan.TICKET_BYTES + 4}")
    with pytest.raises(EPCompileError, match="Ticket"):
        build_files("limits", {toolchain.source_name: wrong}, toolchain, store=Store(tmp_path))


def test_control_comes_first() -> None:
    """Kernels find the control words at the very start of the window, without an offset."""
    assert layout.window_layout(2, layout.window_bytes(2, 64, 1024, 8))["control"].offset == 0


def test_ranks_are_found_by_multiplication() -> None:
    """Routing.rank_of in include/deep_ep/wire/routing.cuh: float arithmetic finds every quotient."""
    experts = torch.arange(layout.MAX_EXPERTS)
    for num_ranks in range(1, layout.MAX_RANKS + 1):
        for local in range(1, layout.MAX_EXPERTS // num_ranks + 1):
            expert = experts[: num_ranks * local]
            share = torch.tensor(num_ranks / (num_ranks * local), dtype=torch.float32)
            found = ((expert.to(torch.float32) + 0.5) * share).to(torch.int32)
            assert torch.equal(found, (expert // local).to(torch.int32)), (num_ranks, local)
