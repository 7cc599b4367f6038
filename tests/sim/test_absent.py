"""A rank that never comes: the others give up, end, and say for whom they waited. Time is virtual."""

from __future__ import annotations

import pytest
import torch

from deep_ep import jit
from deep_ep.errors import EPTimeoutError
from deep_ep.machine.world import World
from tests.elastic import combines
from tests.sim import swarm
from tests.sim.ranks import Buffer, Group, Ranks, Settings

NUM_RANKS, ABSENT, TOKENS, HIDDEN = 3, 1, 6, 64


@pytest.mark.parametrize("roles", swarm.ROLES[:2], ids=["every block sends", "some blocks send"])
@pytest.mark.parametrize(
    "options",
    [combines.PLAIN, combines.Options(True), combines.Options(True, False), combines.Options(zero_copy=True)],
)
def test_a_combine_without_one_rank(options: combines.Options, roles: swarm.RolesOfMachine) -> None:
    def program(group: Group) -> None:
        settings = {"num_max_tokens_per_rank": TOKENS, "hidden": HIDDEN, "num_registered_bytes": 1 << 20}
        buffer = Buffer(group, **settings, allow_multiple_reduction=False)
        buffer.allow_multiple_reduction = options.multiple_reduction
        x = torch.ones(TOKENS, HIDDEN, dtype=torch.bfloat16)
        topk_idx = torch.arange(NUM_RANKS).expand(TOKENS, NUM_RANKS)  # an expert of each rank
        handle = buffer.dispatch(x, topk_idx=topk_idx, num_experts=NUM_RANKS, num_sms=2)[3]
        if group.rank() == ABSENT:
            buffer.run()
            return
        handle.do_expand = options.expanded
        rows = handle.num_expanded_tokens if options.expanded else handle.num_recv_tokens
        y = buffer.registered_empty([rows, HIDDEN]).fill_(1)
        buffer.combine(y, handle, zero_copy=options.zero_copy)
        with pytest.raises(EPTimeoutError, match=rf"in (reduce: for a partial result of|agree: for) rank {ABSENT} "):
            buffer.dispatch(x, topk_idx=topk_idx, num_experts=NUM_RANKS)

    with World() as world:
        settings = Settings(jit.Gxx(), seed=3, num_sms=(2,) * NUM_RANKS, delays={}, patience="expire")
        Ranks(world, NUM_RANKS, settings).run(roles, program)
