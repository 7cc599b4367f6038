"""Mistakes with registered memory and zero_copy, for bad_calls.py."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from deep_ep import ElasticBuffer
from tests.elastic.mistakes import EXPERTS, HIDDEN, MOST, TOKENS, TOPK, Mistake, Table

NUM_REGISTERED_BYTES = 1 << 20


def wrong_in_place(t: Table, without: ElasticBuffer) -> Iterator[Mistake]:
    """
    Args:
        without: a buffer that has no registered memory.
    """
    yield from wrong_registered_tensors(t, without)
    yield from wrong_dispatches_in_place(t, without)
    yield from wrong_combines_in_place(t, without)


def wrong_registered_tensors(t: Table, without: ElasticBuffer) -> Iterator[Mistake]:
    def asking(kind: type[Exception], text: str, *given: Any, buffer: ElasticBuffer = t.buffer) -> Mistake:
        return Mistake(functools.partial(buffer.registered_empty, *given), f"registered_empty{given}", kind, text)

    yield asking(TypeError, "size must be a sequence of lengths, but it is 4", 4)
    yield asking(TypeError, "size must be a sequence of lengths, but it is None", None)
    yield asking(TypeError, "size[1] must be an int, but it is a float", [2, 4.0])
    yield asking(ValueError, "size[0] must be at least 0, but it is -2", (-2, -4))
    yield asking(TypeError, "dtype must be a torch.dtype, but it is 'bfloat16'", [4], "bfloat16")
    yield asking(TypeError, "dtype must be a torch.dtype, but it is None", [4], None)
    too_much = [NUM_REGISTERED_BYTES]
    yield asking(ValueError, f"a registered tensor {too_much} of torch.bfloat16 takes 2097152 bytes", too_much)
    yield asking(ValueError, "num_registered_bytes=0 only 0 are left; build the buffer with", [1], buffer=without)


def wrong_dispatches_in_place(t: Table, without: ElasticBuffer) -> Iterator[Mistake]:
    x = t.buffer.registered_empty([TOKENS, HIDDEN])
    x8 = t.buffer.registered_empty([TOKENS, HIDDEN], torch.float8_e4m3fn)
    sf = t.buffer.registered_empty([TOKENS, 4], torch.float32)
    gaps = t.buffer.registered_empty([TOKENS, 8], torch.float32)
    wide = t.buffer.registered_empty([TOKENS, 2 * HIDDEN])
    flat = t.buffer.registered_empty([TOKENS * HIDDEN + 4])
    for call in (t.mistake, t.again):

        def in_place(kind: type[Exception], text: str, call: Any = call, **changes: Any) -> Mistake:
            mistake: Mistake = call(kind, text, **{"zero_copy": True, **changes})
            return mistake

        yield in_place(ValueError, "x must lie in this buffer's registered memory for zero_copy", x=t.x)
        yield in_place(ValueError, "x must be contiguous and start at a multiple of 16 bytes", x=wide[:, :HIDDEN])
        crooked = flat[4:].view(TOKENS, HIDDEN)
        yield in_place(ValueError, "x starts at an address", x=crooked)
        yield in_place(ValueError, "x[1] must lie in this buffer's registered memory", x=(x8, torch.ones_like(sf)))
        yield in_place(ValueError, "x[0] must lie in this buffer's registered memory", x=(x8.clone(), sf))
        yield in_place(ValueError, "x[1] must be contiguous and start at a multiple of 16", x=(x8, gaps[:, :4]))
        columns = sf.view(4, TOKENS).t()
        yield in_place(ValueError, "x[1] must be contiguous and start at a multiple of 16 bytes", x=(x8, columns))
        three = sf.view(-1)[: 3 * TOKENS].view(TOKENS, 3)
        yield in_place(
            ValueError,
            f"a multiple of 4 scale factors a token for zero_copy, but its shape is [{TOKENS}, 3]",
            x=(x8, three),
        )
        yield in_place(TypeError, "zero_copy must be True or False, but it is None", x=x, zero_copy=None)
    good = {"topk_idx": t.topk_idx, "num_experts": EXPERTS, "num_max_tokens_per_rank": MOST, "zero_copy": True}
    call = functools.partial(without.dispatch, x, **good)
    yield Mistake(call, "dispatch in place without", ValueError, "build the buffer with num_registered_bytes")


def wrong_combines_in_place(t: Table, without: ElasticBuffer) -> Iterator[Mistake]:
    y = t.buffer.registered_empty([t.rows, HIDDEN])
    weights = t.buffer.registered_empty([t.rows, TOPK], torch.float32)

    def in_place(kind: type[Exception], text: str, **changes: Any) -> Mistake:
        return t.combining(kind, text, **{"x": y, "topk_weights": weights, "zero_copy": True, **changes})

    yield in_place(ValueError, "x must lie in this buffer's registered memory for zero_copy", x=t.recv_x)
    text = "topk_weights must lie in this buffer's registered memory for zero_copy"
    yield in_place(ValueError, text, topk_weights=t.recv_weights)
    columns = weights.view(TOPK, t.rows).t()
    yield in_place(ValueError, "topk_weights must be contiguous and start at a multiple of", topk_weights=columns)
    wide = t.buffer.registered_empty([t.rows, 2 * HIDDEN])
    yield in_place(ValueError, "x must be contiguous and start at a multiple of 16 bytes", x=wide[:, HIDDEN:])
    for wrong in (1, "yes", None):
        yield in_place(TypeError, f"zero_copy must be True or False, but it is {wrong!r}", zero_copy=wrong)
    expanded = t.dispatch(expert_alignment=4, do_expand=True)[3]
    rows = t.buffer.registered_empty([expanded.num_expanded_tokens, HIDDEN])
    text = "zero_copy takes rows of the plain layout, but handle.do_expand is True"
    yield in_place(ValueError, text, x=rows, handle=expanded, topk_weights=None)
    call = functools.partial(without.combine, y, t.handle, zero_copy=True)
    yield Mistake(call, "combine in place without", ValueError, "build the buffer with num_registered_bytes")
