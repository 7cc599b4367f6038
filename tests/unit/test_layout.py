"""The window's regions: they lie apart, and a window of the size that we name holds what we said it would."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deep_ep import layout
from deep_ep.layout import MAX_EXPERTS, MAX_RANKS, MAX_TOPK, Record, align, window_bytes, window_layout

PAGE = layout.WINDOW_ALIGNMENT
RANKS = st.integers(1, MAX_RANKS)
TOKENS = st.one_of(st.integers(1, 64), st.integers(1, 8192))
HIDDEN = st.integers(1, 1024).map(lambda eighths: 8 * eighths)
TOPK = st.integers(1, MAX_TOPK)


@given(value=st.integers(0, 1 << 40), alignment=st.integers(1, 1 << 20))
def test_align(value: int, alignment: int) -> None:
    aligned = align(value, alignment)
    assert aligned % alignment == 0
    assert value <= aligned < value + alignment


def test_layouts_are_told_apart() -> None:
    digests = {window_layout(ranks, pages * PAGE).digest() for ranks in (1, 2, 8) for pages in (8, 9, 64)}
    assert len(digests) == 9
    assert window_layout(2, 8 * PAGE).digest() == window_layout(2, 8 * PAGE).digest()


@given(num_ranks=RANKS, pages=st.integers(8, 4096), registered=st.integers(0, 1 << 33))
def test_regions_lie_apart_and_fill_the_window(num_ranks: int, pages: int, registered: int) -> None:
    window = window_layout(num_ranks, pages * PAGE, registered)
    assert [region.name for region in window.regions] == [
        "control",
        "partials",
        "messages",
        "arrived",
        "routed",
        "rows",
        "registered",
    ]
    for region in window.regions:
        assert region.offset % layout.REGION_ALIGNMENT == 0
        assert region.num_bytes > 0 or region.name == "registered"
        assert region.purpose
        assert window[region.name] is region
    for region, following in itertools.pairwise(window.regions):
        assert region.offset + region.num_bytes <= following.offset
    rows, last = window.regions[-2:]
    assert rows.offset + rows.num_bytes == window.num_bytes == last.offset
    assert last.num_bytes == registered
    assert window.total_bytes == align(window.num_bytes + registered, layout.WINDOW_ALIGNMENT)


@given(num_ranks=RANKS, pages=st.integers(8, 64))
def test_regions_hold_what_kernels_index(num_ranks: int, pages: int) -> None:
    """The largest index of include/deep_ep/wire/window.cuh in each region."""
    window = window_layout(num_ranks, pages * PAGE)
    assert window["partials"].num_bytes >= 8 * layout.MAX_BLOCKS * (MAX_EXPERTS + MAX_RANKS)
    assert window["messages"].num_bytes >= 8 * num_ranks * layout.message_words(num_ranks)
    assert window["arrived"].num_bytes >= 4 * num_ranks * window.slots_per_source
    assert window["routed"].num_bytes >= 8 * num_ranks * window.slots_per_source
    assert layout.message_words(num_ranks) >= 1 + 2 * layout.PLAN_WORDS + MAX_EXPERTS // num_ranks


def test_layout_depends_on_ranks_and_size_alone() -> None:
    """Calls of different shapes on one buffer find the marks of earlier calls where those left them."""
    assert window_layout(8, 64 << 20) == window_layout(8, 64 << 20)


@given(num_ranks=RANKS, tokens=TOKENS, hidden=HIDDEN, num_topk=st.integers(0, MAX_TOPK))
def test_size_hint_fits(num_ranks: int, tokens: int, hidden: int, num_topk: int) -> None:
    num_bytes = window_bytes(num_ranks, tokens, hidden, num_topk)
    assert num_bytes % PAGE == 0
    window = window_layout(num_ranks, num_bytes)
    for k in [num_topk] if num_topk else [1, MAX_TOPK]:
        assert window.fits(tokens, Record.of_dispatch(2 * hidden, k))
        assert window.fits(tokens, Record.of_combine(2 * hidden, k))
        assert window.fits(tokens, Record.of_dispatch(align(hidden, 16), k, -(-hidden // 128)))  # FP8


@given(num_ranks=RANKS, tokens=TOKENS, hidden=HIDDEN, num_topk=TOPK)
def test_size_hint_fits_every_row(num_ranks: int, tokens: int, hidden: int, num_topk: int) -> None:
    """Without multiple reduction there is room for whatever there was with it, and for a record of each selection."""
    num_bytes = window_bytes(num_ranks, tokens, hidden, num_topk, allow_multiple_reduction=False)
    assert num_bytes >= window_bytes(num_ranks, tokens, hidden, num_topk)
    window, record = window_layout(num_ranks, num_bytes), Record.of_combine(2 * hidden, 1)
    assert window.fits(tokens, record, num_topk)
    records = tokens * num_topk if num_ranks > 1 else 0
    assert records * record.num_bytes <= window["rows"].num_bytes, "place of token and selection"


@given(num_ranks=st.integers(2, MAX_RANKS), tokens=TOKENS, hidden=HIDDEN, num_topk=TOPK)
def test_size_hint_is_tight(num_ranks: int, tokens: int, hidden: int, num_topk: int) -> None:
    """With two pages less the same tokens do not fit."""
    num_bytes = window_bytes(num_ranks, tokens, hidden, num_topk) - 2 * PAGE
    try:
        smaller = window_layout(num_ranks, num_bytes)
    except ValueError:
        return
    both = (Record.of_dispatch(2 * hidden, num_topk), Record.of_combine(2 * hidden, num_topk))
    assert not all(smaller.fits(tokens, record) for record in both)


@given(num_ranks=RANKS, tokens=TOKENS, hidden=HIDDEN, num_topk=TOPK)
def test_size_hint_grows_with_every_setting(num_ranks: int, tokens: int, hidden: int, num_topk: int) -> None:
    base = window_bytes(num_ranks, tokens, hidden, num_topk)
    assert window_bytes(num_ranks, tokens + 1, hidden, num_topk) >= base
    assert window_bytes(num_ranks, tokens, hidden + 8, num_topk) >= base
    assert window_bytes(num_ranks, tokens, hidden, 0) >= base
    assert window_bytes(num_ranks, tokens, hidden, MAX_TOPK) == window_bytes(num_ranks, tokens, hidden, 0)


def test_protocol_md_shows_what_a_window_takes(capsys: pytest.CaptureFixture[str]) -> None:
    """Its snippet prints what stands below it."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "protocol.md").read_text()
    ((code, promised),) = re.findall(
        r"^```python\n(from deep_ep\.layout.*?)^```\n\n```text\n(.*?)^```", page, re.M | re.S
    )
    exec(code, {})
    assert capsys.readouterr().out == promised
    assert "So 55% and 91%." in page
    assert [round(100 * ratio_to_slots(num_ranks)) for num_ranks in (2, 8)] == [55, 91]
    smaller = window_bytes(2, 4096, 7168, 8, allow_multiple_reduction=False)
    assert smaller == window_bytes(8, 4096, 7168, 8, allow_multiple_reduction=False)
    assert f"`M x K` records, {smaller / 1e6:.0f} MB" in page


def ratio_to_slots(num_ranks: int, num_max_tokens: int = 4096, hidden: int = 7168) -> float:
    """Our window to R x M slots that hold nothing but a row of bfloat16."""
    return window_bytes(num_ranks, num_max_tokens, hidden, num_topk=8) / (num_ranks * num_max_tokens * 2 * hidden)


@given(num_ranks=st.integers(2, 16), num_max_tokens=st.integers(4096, 16384), hidden=st.integers(28, 64))
def test_a_window_is_smaller_than_a_slot_for_every_token_of_every_rank(
    num_ranks: int, num_max_tokens: int, hidden: int
) -> None:
    """Prefill, rows of 7 KiB and more; marks and partial counts weigh more in smaller windows."""
    assert ratio_to_slots(num_ranks, num_max_tokens, 128 * hidden) < 1


def test_a_usual_size() -> None:
    """4096 tokens of 7168 bfloat16 on 8 ranks: what must be kept is 7 x 4096 rows, and a window is hardly more."""
    rows = 7 * 4096 * 7168 * 2
    assert rows < window_bytes(8, 4096, 7168, 8) < 1.05 * rows


@given(row_bytes=st.integers(1, 2048).map(lambda n: 16 * n), num_topk=TOPK, num_scales=st.integers(0, 512))
def test_records(row_bytes: int, num_topk: int, num_scales: int) -> None:
    sent, back = Record.of_dispatch(row_bytes, num_topk, num_scales), Record.of_combine(row_bytes, num_topk)
    assert sent.tail_bytes >= 4 * num_scales
    assert sent.label_bytes >= 4 * 3 * num_topk, "expert, position and weight of each selection"
    assert sent.label_bytes % layout.SECTOR_BYTES == 0
    assert back.tail_bytes >= 4 * num_topk
    for record in (sent, back):
        assert record.tail_bytes % layout.SECTOR_BYTES == 0
        assert record.num_bytes % layout.LINE_BYTES == 0
        assert (
            record.row_bytes + record.tail_bytes <= record.num_bytes < row_bytes + record.tail_bytes + layout.LINE_BYTES
        )


@pytest.mark.parametrize("num_bytes", [0, -PAGE, PAGE + 1, 1000])
def test_size_must_be_whole_pages(num_bytes: int) -> None:
    message = f"num_bytes must be a positive multiple of 2 MiB (2097152), but it is {num_bytes}; "
    with pytest.raises(ValueError, match=re.escape(message)):
        window_layout(4, num_bytes)


def test_a_window_that_is_too_small_is_told_what_it_takes() -> None:
    with pytest.raises(ValueError, match="num_bytes must be at least") as caught:
        window_layout(4, PAGE)
    (least,) = re.findall(r"at least (\d+) for 4 ranks, but it is 2097152", str(caught.value))
    window_layout(4, int(least))
