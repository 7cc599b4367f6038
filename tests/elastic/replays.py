"""Round trips over tensors that change in place, as CUDA graphs want them, and checks for which the host waits seldom.

A trip is captured once and replayed with ever other inputs; on simulated ranks its calls are made anew each time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import deep_ep
from deep_ep import ElasticBuffer, EPHandle
from tests import oracle

KINDS = ("random", "holes", "skewed", "masked", "random", "one idle")  # of selections, by draw
SPARE_TOKENS = 2


@dataclass(frozen=True)
class Shape:
    """What a graph fixes; the same on all ranks, each of which has its number of tokens.

    Attributes:
        num_scales: scale factors of a row, which is FP8 then; 0 stands for bfloat16.
        cached: the routes are those of a dispatch before, and only what travels changes.
        again: another dispatch in the other layout follows by the first one's handle, as the backward pass has it.
        zero_copy: what dispatches are given, and plain rows that are combined, lie in registered memory.
    """

    tokens: tuple[int, ...]
    hidden: int = 64
    num_topk: int = 3
    local_experts: int = 4
    alignment: int = 1
    num_scales: int = 0
    num_biases: int = 0
    expanded: bool = False
    multiple_reduction: bool = True
    cached: bool = False
    again: bool = False
    zero_copy: bool = False

    @property
    def num_experts(self) -> int:
        return self.local_experts * len(self.tokens)

    @property
    def max_tokens(self) -> int:
        return max(self.tokens) + SPARE_TOKENS

    def draw(self, seed: int) -> list[list[oracle.Inputs]]:
        """Inputs of all ranks, several times: of other routes, or of the same where those are known."""
        sizes = (self.hidden, self.num_scales)
        if self.cached:
            first = oracle.draw(seed, len(self.tokens), list(self.tokens), *sizes, self.num_topk, self.num_experts)
            return [first, *(oracle.redraw(first, seed + i, *sizes) for i in range(1, len(KINDS)))]
        return [self._draw_one(seed + i, kind) for i, kind in enumerate(KINDS)]

    def _draw_one(self, seed: int, kind: str) -> list[oracle.Inputs]:
        numbers = (self.hidden, self.num_scales, self.num_topk, self.num_experts)
        known = "random" if kind == "one idle" else kind
        inputs = oracle.draw(seed, len(self.tokens), list(self.tokens), *numbers, known)
        if kind == "one idle":
            inputs[seed % len(inputs)].topk_idx[:] = -1
        return inputs


@dataclass(frozen=True)
class Given:
    """A rank's tensors of a trip, on the device of its kernels."""

    payload: tuple[torch.Tensor, ...]  # x, or x8 and its scale factors
    topk_idx: torch.Tensor
    weights: torch.Tensor
    biases: tuple[torch.Tensor, ...]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return *self.payload, self.topk_idx, self.weights, *self.biases

    def copied(self) -> Given:
        payload, biases = ([each.clone() for each in several] for several in (self.payload, self.biases))
        return Given(tuple(payload), self.topk_idx.clone(), self.weights.clone(), tuple(biases))


@dataclass(frozen=True)
class Rows:
    """What a dispatch is to fill of one layout: these rows, and nothing is said about others."""

    where: torch.Tensor
    payload: tuple[torch.Tensor, ...]
    weights: torch.Tensor

    @staticmethod
    def of(there: oracle.Dispatched, inputs: list[oracle.Inputs], expanded: bool) -> Rows:
        if not expanded:
            return Rows(torch.arange(len(there.tokens)), (there.x, there.scales), there.weights)
        used = [(row, place) for row, place in enumerate(there.expanded) if place is not None]
        row_of = {place: row for row, place in enumerate(there.tokens)}
        plain = [row_of[place[:2]] for _, place in used]
        weights = torch.tensor([float(inputs[source].weights[token, k]) for _, (source, token, k) in used])
        where = torch.tensor([row for row, _ in used], dtype=torch.int64)
        return Rows(where, (there.x[plain], there.scales[plain]), weights)

    def whole(self, num_rows: int, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All rows of the layout as experts leave them, and their weights."""
        rows = processed(self.payload[0], factor)
        values = torch.zeros(num_rows, rows.shape[1], dtype=torch.bfloat16)
        weights = torch.zeros(num_rows, *self.weights.shape[1:])
        values[self.where], weights[self.where] = rows, self.weights
        return values, weights


def processed(rows: torch.Tensor, factor: int) -> torch.Tensor:
    """What this rank's "experts" make of rows, in bfloat16."""
    if rows.dtype == torch.float8_e4m3fn:
        rows = rows.view(torch.uint8).to(torch.bfloat16)  # 0 to 255, exactly
    return rows * factor


class Draw:
    """One draw of a trip's inputs, and what must come of it at this rank."""

    def __init__(self, shape: Shape, inputs: list[oracle.Inputs], seed: int, rank: int, device: torch.device) -> None:
        own, chance = inputs[rank], torch.Generator().manual_seed(seed)
        biases = [
            [torch.randn(count, shape.hidden, generator=chance).bfloat16() for _ in range(shape.num_biases)]
            for count in shape.tokens
        ][rank]
        sizes = (shape.num_experts, shape.max_tokens, shape.alignment)
        everywhere = [oracle.dispatch(inputs, each, *sizes, worst_case=True) for each in range(len(inputs))]
        mine = everywhere[rank]
        self.num_received, self.per_expert = len(mine.tokens), ints(mine.per_expert, device)
        self.per_rank, self.per_expert_end = ints(mine.per_rank, device), ints(mine.per_expert_end, device)
        self.topk_idx = mine.topk_idx.to(device, deep_ep.topk_idx_t)
        self.metadata = mine.metadata.to(device)
        payload = (own.x, own.scales) if shape.num_scales else (own.x,)
        self.given = Given(
            tuple(each.to(device) for each in payload),
            own.topk_idx.to(device, deep_ep.topk_idx_t),
            own.weights.to(device),
            tuple(each.to(device) for each in biases),
        )
        self.rows = {}
        for expanded in (False, True):
            rows = Rows.of(mine, inputs, expanded)
            payload = tuple(each.to(device) for each in rows.payload[: len(payload)])
            self.rows[expanded] = Rows(rows.where.to(device), payload, rows.weights.to(device))
        combined, weights = _combined(shape, inputs, everywhere, rank, biases)
        self.combined, self.combined_weights = combined.to(device), weights.to(device)


def _combined(
    shape: Shape, inputs: list[oracle.Inputs], everywhere: list[oracle.Dispatched], rank: int, biases: list[Any]
) -> oracle.Plain:
    """What comes home when every rank's experts have done their work."""
    results = []
    for each, there in enumerate(everywhere):
        num_rows = len(there.expanded) if shape.expanded else len(there.tokens)
        results.append(Rows.of(there, inputs, shape.expanded).whole(num_rows, each + 1))
    outputs, weights = map(list, zip(*results, strict=True))
    if shape.expanded and not shape.multiple_reduction:
        return oracle.combine_every_row(inputs, outputs, weights, everywhere, rank, shape.num_experts, biases)
    if shape.expanded:
        outputs, weights = map(list, zip(*map(oracle.reduce_expanded, outputs, weights, everywhere), strict=True))
    return oracle.combine(inputs, outputs, weights, everywhere, rank, shape.num_experts, biases)


def ints(values: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Results:
    """What a trip's calls returned; graphs write into the same tensors each time."""

    payload: tuple[torch.Tensor, ...]
    topk_idx: torch.Tensor | None
    weights: torch.Tensor
    handle: EPHandle
    again: tuple[torch.Tensor, ...] | None
    combined: torch.Tensor
    combined_weights: torch.Tensor


class Verdicts:
    """Whether results are what they should be, found out on the device and looked at later, many at once."""

    def __init__(self) -> None:
        self._found: list[tuple[str, torch.Tensor]] = []

    def compare(self, what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
        """Bit for bit; another shape or dtype raises at once."""
        assert got.shape == expected.shape, f"{what} is {list(got.shape)}, expected {list(expected.shape)}"
        assert got.dtype == expected.dtype, f"{what} is {got.dtype}, expected {expected.dtype}"
        as_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
        self._found.append((what, (got.view(as_bits) != expected.view(as_bits)).any()))

    def check(self) -> None:
        """Raises AssertionError, naming the first that differs and how many do."""
        found, self._found = self._found, []
        if not found:
            return
        wrong = torch.stack([differs for _, differs in found]).cpu().nonzero().flatten().tolist()
        assert not wrong, f"{found[wrong[0]][0]} is wrong, and {len(wrong)} of {len(found)} results in all"


class Trip:
    """A dispatch, what experts do, and the combine: always the same tensors, with ever other values in them."""

    def __init__(self, shape: Shape, buffer: ElasticBuffer, device: torch.device, seed: int) -> None:
        self.shape, self.buffer, self.rank = shape, buffer, buffer.rank_idx
        self._draws = [
            Draw(shape, inputs, seed + i, self.rank, device) for i, inputs in enumerate(shape.draw(100 * seed))
        ]
        self._chance = random.Random(seed)  # all ranks draw alike
        self.due = self._draws[0]
        self.given = self.due.given.copied()
        self._to_combine: tuple[torch.Tensor, torch.Tensor] | None = None
        if shape.zero_copy:
            self._register()
        self.stats = torch.zeros(shape.local_experts, dtype=torch.int32, device=device)
        self._expected_stats = self.stats.clone()
        self._known: EPHandle | None = None
        if shape.cached:
            self._known = self._dispatch(
                self.given, {"topk_idx": self.given.topk_idx, "num_experts": shape.num_experts}
            )[3]

    def _register(self) -> None:
        """Places in registered memory, where values change."""
        payload = tuple(self.buffer.registered_empty(each.shape, each.dtype).copy_(each) for each in self.given.payload)
        self.given = replace(self.given, payload=payload)
        if not self.shape.expanded:
            num_rows = len(self.shape.tokens) * self.shape.max_tokens
            rows = self.buffer.registered_empty([num_rows, self.shape.hidden])
            self._to_combine = rows, self.buffer.registered_empty([num_rows, self.shape.num_topk], torch.float32)

    def load(self) -> None:
        """Put other values into the tensors than they had, in stream order."""
        self.due = self._chance.choice([draw for draw in self._draws if draw is not self.due])
        for to, value in zip(self.given.tensors, self.due.given.tensors, strict=True):
            to.copy_(value)

    def calls(
        self,
        produce: Callable[[Given], Given] = lambda given: given,
        between: Callable[[], None] = lambda: None,
        by_event: bool = False,
        **timing: Any,
    ) -> Results:
        """Make the calls.

        Args:
            produce: gives what the calls take, from what was loaded.
            between: done between dispatch and combine.
            by_event: the calls wait for an event that says when their inputs are there.
            timing: arguments of both calls that say when they run.
        """
        shape, given = self.shape, produce(self.given)
        routes: dict[str, Any] = {"handle": self._known}
        if not shape.cached:
            routes = {"topk_idx": given.topk_idx, "num_experts": shape.num_experts, "do_cpu_sync": False}
        routes |= {"topk_weights": given.weights, "cumulative_local_expert_recv_stats": self.stats}
        before = {"previous_event": self.buffer.capture()} if by_event else {}
        recv_x, recv_idx, recv_weights, handle, event = self._dispatch(given, routes | timing | before)
        event.current_stream_wait()
        between()
        again = None
        if shape.again:
            how = {"do_expand": not shape.expanded, "zero_copy": shape.zero_copy}
            again = as_pair(self.buffer.dispatch(plain(given.payload), handle=handle, **how)[0])
            handle.do_expand = shape.expanded
        self.buffer.allow_multiple_reduction = shape.multiple_reduction
        payload = as_pair(recv_x)
        rows, weights = processed(payload[0], self.rank + 1), recv_weights
        if self._to_combine is not None:
            room, room_of_weights = self._to_combine
            rows, weights = room[: len(rows)].copy_(rows), room_of_weights[: len(rows)].copy_(weights)
        before = {"previous_event": self.buffer.capture()} if by_event else {}
        bias = {0: None, 1: given.biases[:1], 2: given.biases}[shape.num_biases]
        combined, combined_weights, event = self.buffer.combine(
            rows,
            handle,
            topk_weights=weights,
            bias=bias,
            zero_copy=self._to_combine is not None,
            **timing,
            **before,
        )
        with event:
            pass  # leaving waits
        assert combined_weights is not None
        return Results(payload, recv_idx, recv_weights, handle, again, combined, combined_weights)

    def _dispatch(self, given: Given, arguments: dict[str, Any]) -> Any:
        """``arguments``: beside those that follow from the shape."""
        shape = self.shape
        if "topk_idx" in arguments:
            arguments |= {"num_max_tokens_per_rank": shape.max_tokens, "expert_alignment": shape.alignment}
        return self.buffer.dispatch(
            plain(given.payload),
            do_expand=shape.expanded,
            do_zero_padding=shape.expanded,
            use_tma_aligned_col_major_sf=shape.num_scales > 0,
            zero_copy=shape.zero_copy,
            **arguments,
        )

    def compare(self, what: str, results: Results, verdicts: Verdicts) -> None:
        """Hold the results of the last calls against what was loaded last."""
        due, count, expanded = self.due, self.due.num_received, self.shape.expanded
        rows = due.rows[expanded]
        for name, got, expected in zip(("recv_x", "recv_sf"), results.payload, rows.payload, strict=False):
            verdicts.compare(f"{what}: {name}", got[rows.where], expected)
        verdicts.compare(f"{what}: recv_topk_weights", results.weights[rows.where], rows.weights)
        if results.topk_idx is not None:
            verdicts.compare(f"{what}: recv_topk_idx", results.topk_idx[:count], due.topk_idx)
            rest = results.topk_idx[count:]
            verdicts.compare(f"{what}: recv_topk_idx past the real count", rest, torch.full_like(rest, -1))
        if results.again is not None:
            others = due.rows[not expanded]
            verdicts.compare(f"{what}: recv_x again", results.again[0][others.where], others.payload[0])
        self._expected_stats += due.per_expert
        handle, rows_from = results.handle, results.handle.recv_src_metadata
        for name, got, expected in (
            ("stats", self.stats, self._expected_stats),
            ("metadata", rows_from[:count], due.metadata),
            ("metadata past the real count", rows_from[count:], torch.full_like(rows_from[count:], -1)),
            ("rows by rank", handle.psum_num_recv_tokens_per_scaleup_rank, due.per_rank),
            ("counts by expert", handle.num_unaligned_recv_tokens_per_expert, due.per_expert),
            ("ends by expert", handle.per_expert_end, due.per_expert_end),
            ("combined_x", results.combined, due.combined),
            ("combined_topk_weights", results.combined_weights, due.combined_weights),
        ):
            verdicts.compare(f"{what}: {name}", got, expected)


def plain(payload: tuple[torch.Tensor, ...]) -> Any:
    """As dispatch takes it."""
    return payload if len(payload) == 2 else payload[0]


def as_pair(received: Any) -> tuple[torch.Tensor, ...]:
    return received if isinstance(received, tuple) else (received,)


class Recording:
    """Calls captured in a CUDA graph; on simulated ranks, made anew in each replay."""

    def __init__(self, calls: Callable[[], Results], device: torch.device) -> None:
        self._calls = calls
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._results = calls()

    def replay(self) -> Results:
        """On the current stream."""
        if self._graph is None:
            return self._calls()
        self._graph.replay()
        return self._results


def replay_in_turn(trips: Sequence[tuple[Trip, Recording]], count: int) -> None:
    """Replay the one or the other, each time with new values, and look at everything that comes out."""
    verdicts, chance = Verdicts(), random.Random(count)
    for replay_idx in range(count):
        which = replay_idx if replay_idx < len(trips) else chance.randrange(len(trips))
        trip, recording = trips[which]
        trip.load()
        trip.compare(f"replay {replay_idx} of trip {which}", recording.replay(), verdicts)
        if replay_idx % 100 == 99:
            verdicts.check()
    verdicts.check()


def small(num_ranks: int, **changes: Any) -> Shape:
    """A shape of a few tokens, none of them on the last rank of three or more."""
    tokens = tuple(11 - 2 * rank for rank in range(num_ranks))
    return replace(Shape(tokens if num_ranks < 3 else (*tokens[:-1], 0)), **changes)
