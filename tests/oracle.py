"""What dispatch and combine must return, computed for all ranks at once in plain numpy and torch.

Shares no code with deep_ep: it is written from the interface's text alone, one token at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

Plain = tuple[torch.Tensor, torch.Tensor]  # rows [N, H] bfloat16, weights [N, K]


@dataclass
class Inputs:
    """One rank's arguments of a round trip."""

    x: torch.Tensor  # [T, H] bfloat16 or float8_e4m3fn
    scales: torch.Tensor  # [T, P] int32: any bits; none if P is 0
    topk_idx: torch.Tensor  # [T, K] int64
    weights: torch.Tensor  # [T, K] float32


@dataclass
class Dispatched:
    """What one rank receives."""

    x: torch.Tensor
    scales: torch.Tensor
    topk_idx: torch.Tensor
    weights: torch.Tensor
    metadata: torch.Tensor
    per_rank: list[int]
    per_expert_aligned: list[int]
    per_expert_end: list[int]
    per_expert: list[int]
    aligned_list: list[int]
    tokens: list[tuple[int, int]]  # (source, token) of each row
    expanded: list[tuple[int, int, int] | None]  # (source, token, selection) of each row of the expanded layout
    worst_case_rows: int  # of the expanded layout


def draw(
    seed: int,
    num_ranks: int,
    tokens: list[int],
    hidden: int,
    num_scales: int,
    num_topk: int,
    num_experts: int,
    kind: str = "random",
) -> list[Inputs]:
    """Inputs of every rank. ``kind``: random, skewed (all to the last rank), masked (no expert), holes (many -1), twice
    (some experts are named several times), same (every selection names expert 0), outside (some numbers are no experts:
    as good as -1)."""
    generator = np.random.default_rng(seed)
    local = num_experts // num_ranks
    result = []
    for num_tokens in tokens:
        idx = np.full((num_tokens, num_topk), -1, dtype=np.int64)
        for token in range(num_tokens):
            low = num_experts - local if kind == "skewed" else 0
            choices = generator.permutation(np.arange(low, num_experts))[:num_topk]
            idx[token, : len(choices)] = choices
            generator.shuffle(idx[token])
        if kind == "masked":
            idx[:] = -1
        if kind == "holes":
            idx[generator.random(idx.shape) < 0.4] = -1
        if kind == "outside":
            no_experts = np.array([num_experts, num_experts + 31, 2**31 - 1, -2, -(2**31)])
            idx = np.where(generator.random(idx.shape) < 0.4, generator.choice(no_experts, idx.shape), idx)
        if kind == "twice":
            idx = np.where(
                generator.random((num_tokens, num_topk)) < generator.random((num_tokens, 1)), idx[:, :1], idx
            )
        if kind == "same":
            idx[:] = 0
        result.append(_carrying(generator, torch.from_numpy(idx), hidden, num_scales))
    return result


def redraw(inputs: list[Inputs], seed: int, hidden: int, num_scales: int) -> list[Inputs]:
    """Other tokens of the same selections."""
    generator = np.random.default_rng(seed)
    return [_carrying(generator, own.topk_idx, hidden, num_scales) for own in inputs]


def _carrying(generator: np.random.Generator, topk_idx: torch.Tensor, hidden: int, num_scales: int) -> Inputs:
    """Tokens with these selections. With scale factors, rows and factors are any bits: nobody is to look at them."""
    num_tokens, num_topk = topk_idx.shape
    if num_scales:
        x = torch.from_numpy(generator.integers(0, 256, (num_tokens, hidden), dtype=np.uint8))
        x = x.view(torch.float8_e4m3fn)
    else:
        x = torch.from_numpy(generator.standard_normal((num_tokens, hidden)).astype(np.float32)).bfloat16()
    scales = torch.from_numpy(generator.integers(-(1 << 31), 1 << 31, (num_tokens, num_scales), dtype=np.int32))
    weights = torch.from_numpy(generator.random((num_tokens, num_topk)).astype(np.float32))
    return Inputs(x, scales, topk_idx, weights)


def dispatch(
    inputs: list[Inputs], rank: int, num_experts: int, max_tokens: int, alignment: int, worst_case: bool
) -> Dispatched:
    """What ``rank`` receives: rows ordered by (source rank, token); expanded, by (expert, source rank, token).

    Args:
        worst_case: the expanded layout has ``worst_case_rows``; experts that are named twice may need more, and rows
            beyond those are lost.
    """
    num_ranks = len(inputs)
    local = num_experts // num_ranks
    num_topk = inputs[0].topk_idx.shape[1]
    mine = range(rank * local, (rank + 1) * local)

    tokens = [
        (source, token)
        for source in range(num_ranks)
        for token, chosen in enumerate(inputs[source].topk_idx.tolist())
        if any(expert in mine for expert in chosen)
    ]
    per_rank, per_expert = [0] * num_ranks, [0] * local
    for source, token in tokens:
        per_rank[source] += 1
        for expert in inputs[source].topk_idx[token].tolist():
            if expert in mine:
                per_expert[expert - rank * local] += 1
    aligned = [(count + alignment - 1) // alignment * alignment for count in per_expert]
    next_row = [sum(aligned[:expert]) for expert in range(local)]
    worst_case_rows = num_ranks * max_tokens * min(num_topk, local) + (alignment - 1) * local
    worst_case_rows = (worst_case_rows + alignment - 1) // alignment * alignment
    num_expanded = min(sum(aligned), worst_case_rows) if worst_case else sum(aligned)
    expanded: list[tuple[int, int, int] | None] = [None] * num_expanded

    idx = torch.full((len(tokens), num_topk), -1, dtype=torch.int64)
    metadata = torch.full((len(tokens), num_topk + 2), -1, dtype=torch.int32)
    for row, (source, token) in enumerate(tokens):
        metadata[row, 0] = source * max_tokens + token
        for k, expert in enumerate(inputs[source].topk_idx[token].tolist()):
            if expert in mine:
                here = expert - rank * local
                idx[row, k] = here
                metadata[row, 1] = source * num_topk + k
                if next_row[here] < num_expanded:
                    metadata[row, 2 + k] = next_row[here]
                    expanded[next_row[here]] = (source, token, k)
                next_row[here] += 1
    return Dispatched(
        x=torch.stack([inputs[s].x[t] for s, t in tokens]) if tokens else inputs[0].x[:0],
        scales=torch.stack([inputs[s].scales[t] for s, t in tokens]) if tokens else inputs[0].scales[:0],
        topk_idx=idx,
        weights=torch.stack([inputs[s].weights[t] for s, t in tokens]) if tokens else inputs[0].weights[:0],
        metadata=metadata,
        per_rank=np.cumsum(per_rank).tolist(),
        per_expert_aligned=np.cumsum(aligned).tolist(),
        per_expert_end=next_row,
        per_expert=per_expert,
        aligned_list=aligned,
        tokens=tokens,
        expanded=expanded,
        worst_case_rows=worst_case_rows,
    )


def combine(
    inputs: list[Inputs],
    outputs: list[torch.Tensor],
    out_weights: list[torch.Tensor],
    dispatched: list[Dispatched],
    rank: int,
    num_experts: int,
    bias: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``rank`` gets back when rank r passes ``outputs[r]`` (plain rows) and ``out_weights[r]`` to combine."""
    local = num_experts // len(inputs)
    own = inputs[rank]
    hidden, num_topk = outputs[0].shape[1], own.topk_idx.shape[1]
    row_of = [{place: row for row, place in enumerate(d.tokens)} for d in dispatched]
    x = torch.zeros(len(own.x), hidden, dtype=torch.bfloat16)
    weights = torch.zeros(len(own.x), num_topk)
    for token, chosen in enumerate(own.topk_idx.tolist()):
        total = np.zeros(hidden, dtype=np.float32)
        for b in bias:
            total = total + b[token].float().numpy()
        last = {}  # rank -> its last selection
        for k, expert in enumerate(chosen):
            if 0 <= expert < num_experts:
                last[expert // local] = k
                weights[token, k] = out_weights[expert // local][row_of[expert // local][rank, token], k]
        for at in sorted(last, key=lambda r: last[r]):
            total = total + outputs[at][row_of[at][rank, token]].float().numpy()
        x[token] = torch.from_numpy(total).bfloat16()
    return x, weights


def reduce_expanded(outputs: torch.Tensor, out_weights: torch.Tensor, there: Dispatched) -> Plain:
    """Plain rows and weights out of expanded ones: the first step of a combine with ``allow_multiple_reduction``."""
    rows = torch.zeros(len(there.tokens), outputs.shape[1], dtype=torch.bfloat16)
    weights = torch.zeros(len(there.tokens), there.topk_idx.shape[1])
    for received, places in enumerate(there.metadata[:, 2:].tolist()):
        total = np.zeros(outputs.shape[1], dtype=np.float32)
        for k, place in enumerate(places):
            if place >= 0:
                total = total + outputs[place].float().numpy()
                weights[received, k] = out_weights[place]
        rows[received] = torch.from_numpy(total).bfloat16()
    return rows, weights


def combine_every_row(
    inputs: list[Inputs],
    outputs: list[torch.Tensor],
    out_weights: list[torch.Tensor],
    dispatched: list[Dispatched],
    rank: int,
    num_experts: int,
    bias: list[torch.Tensor],
) -> Plain:
    """As combine, from expanded rows and weights without ``allow_multiple_reduction``."""
    local = num_experts // len(inputs)
    own = inputs[rank]
    received_as = [{place: row for row, place in enumerate(d.tokens)} for d in dispatched]
    x = torch.zeros(len(own.x), outputs[0].shape[1], dtype=torch.bfloat16)
    weights = torch.zeros(own.topk_idx.shape)
    for token, chosen in enumerate(own.topk_idx.tolist()):
        total = np.zeros(outputs[0].shape[1], dtype=np.float32)
        for b in bias:
            total = total + b[token].float().numpy()
        for k, expert in enumerate(chosen):
            if not 0 <= expert < num_experts:
                continue
            at = expert // local
            place = int(dispatched[at].metadata[received_as[at][rank, token], 2 + k])
            if place >= 0:
                total = total + outputs[at][place].float().numpy()
                weights[token, k] = out_weights[at][place]
        x[token] = torch.from_numpy(total).bfloat16()
    return x, weights
