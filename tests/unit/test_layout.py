"""The window's regions: they lie apart, and a window of the size that we name holds what we said it would."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deep_ep import layout
from deep_ep.layout import (
    MAX_EXPERTS,
    MAX_RANKS,
    MAX_TOPK,
    Record,
    WindowLayout,
    align,
    labels_bytes,
    window_bytes,
    window_layout,
)

PAGE = layout.WINDOW_ALIGNMENT
RANKS = st.integers(1, MAX_RANKS)
TOKENS = st.one_of(st.integers(1, 64), st.integers(1, 8192))
HIDDEN = st.integers(1, 1024).map(lambda eighths: 8 * eighths)
TOPK = st.integers(1, MAX_TOPK)


def fitting(num_ranks: int, tokens: int, hidden: int, num_topk: int, is_told: bool, **how: bool) -> WindowLayout:
    """The window of a buffer that is built for these sizes, or with as many bytes as the hint says."""
    num_bytes = window_bytes(num_ranks, tokens, hidden, num_topk, sizes_are_told=is_told, **how)
    assert num_bytes % PAGE == 0
    labels = labels_bytes(num_ranks, tokens, num_topk or MAX_TOPK)
    return window_layout(num_ranks, num_bytes, labels if is_told else None)


@given(value=st.integers(0, 1 << 40), alignment=st.integers(1, 1 << 20))
def test_align(value: int, alignment: int) -> None:
    aligned = align(value, alignment)
    assert aligned % alignment == 0
    assert value <= aligned < value + alignment


def test_layouts_are_told_apart() -> None:
    digests = {window_layout(ranks, pages * PAGE).digest() for ranks in (1, 2, 8) for pages in (8, 9, 64)}
    assert len(digests) == 9
    assert window_layout(2, 8 * PAGE).digest() == window_layout(2, 8 * PAGE).digest()


@given(
    num_ranks=RANKS,
    pages=st.integers(8, 4096),
    labels=st.one_of(st.none(), st.integers(1, PAGE)),
    registered=st.integers(0, 1 << 33),
)
def test_regions_lie_apart_and_fill_the_window(num_ranks: int, pages: int, labels: int | None, registered: int) -> None:
    window = window_layout(num_ranks, pages * PAGE, labels, registered)
    assert [region.name for region in window.regions] == [
        "control",
        "partials",
        "messages",
        "arrived",
        "routed",
        "labels",
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
    assert window["labels"].num_bytes == (window.num_bytes // layout.LABELS_SHARE if labels is None else labels)
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
    said_in_an_epoch = layout.PLAN_WORDS + layout.PLACE_WORDS
    assert layout.message_words(num_ranks) >= 1 + 2 * said_in_an_epoch + MAX_EXPERTS // num_ranks


def test_layout_depends_on_ranks_and_size_alone() -> None:
    """Calls of different shapes on one buffer find the marks of earlier calls where those left them."""
    assert window_layout(8, 64 << 20) == window_layout(8, 64 << 20)


@given(num_ranks=RANKS, tokens=TOKENS, hidden=HIDDEN, num_topk=st.integers(0, MAX_TOPK), is_told=st.booleans())
def test_size_hint_fits(num_ranks: int, tokens: int, hidden: int, num_topk: int, is_told: bool) -> None:
    window = fitting(num_ranks, tokens, hidden, num_topk, is_told)
    for k in [num_topk] if num_topk else [1, MAX_TOPK]:
        assert window.fits(tokens, Record.of_dispatch(2 * hidden), num_labels=k)
        assert window.fits(tokens, Record.of_combine(2 * hidden, k))
        assert window.fits(tokens, Record.of_dispatch(align(hidden, 16), -(-hidden // 128)), num_labels=k)  # FP8
        last = ((num_ranks - 1) * tokens + tokens - 1) * k + k - 1  # selection of the last source's last token
        assert layout.LABEL_BYTES * (last + 1) <= window["labels"].num_bytes


@given(num_ranks=RANKS, tokens=TOKENS, hidden=HIDDEN, num_topk=TOPK, is_told=st.booleans())
def test_size_hint_fits_every_row(num_ranks: int, tokens: int, hidden: int, num_topk: int, is_told: bool) -> None:
    """Without multiple reduction there is room for whatever there was with it, and for a record of each selection."""
    window = fitting(num_ranks, tokens, hidden, num_topk, is_told, allow_multiple_reduction=False)
    assert window.num_bytes >= fitting(num_ranks, tokens, hidden, num_topk, is_told).num_bytes
    record = Record.of_combine(2 * hidden, 1)
    assert window.fits(tokens, record, num_topk)
    assert window.fits(tokens, Record.of_dispatch(2 * hidden), num_labels=num_topk)
    records = tokens * num_topk if num_ranks > 1 else 0
    assert records * record.num_bytes <= window["rows"].num_bytes, "place of token and selection"


@given(num_ranks=st.integers(2, MAX_RANKS), tokens=TOKENS, hidden=HIDDEN, num_topk=TOPK, is_told=st.booleans())
def test_size_hint_is_tight(num_ranks: int, tokens: int, hidden: int, num_topk: int, is_told: bool) -> None:
    """With two pages less the same tokens do not fit."""
    window = fitting(num_ranks, tokens, hidden, num_topk, is_told)
    num_label_bytes = window["labels"].num_bytes if is_told else None
    try:
        smaller = window_layout(num_ranks, window.num_bytes - 2 * PAGE, num_label_bytes)
    except ValueError:
        return
    has_room = smaller.fits(tokens, Record.of_dispatch(2 * hidden), num_labels=num_topk)
    assert not (has_room and smaller.fits(tokens, Record.of_combine(2 * hidden, num_topk)))


@given(num_ranks=RANKS, tokens=TOKENS, num_topk=TOPK)
def test_labels_of_one_selection_more_do_not_fit(num_ranks: int, tokens: int, num_topk: int) -> None:
    """Where a buffer was told its sizes, there is exactly room for them, whatever is left for rows."""
    window, record = fitting(num_ranks, tokens, 1024, num_topk, is_told=True), Record.of_dispatch(16)
    assert window.fits(tokens, record, num_labels=num_topk)
    assert not window.fits(tokens, record, num_labels=num_topk + 1)


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
    assert "So 55% and 92%." in page
    assert [round(100 * ratio_to_slots(num_ranks)) for num_ranks in (2, 8)] == [55, 92]
    every_row = [window_bytes(num_ranks, 4096, 7168, 8, allow_multiple_reduction=False) for num_ranks in (2, 8)]
    assert f"`M x K` records, {every_row[0] / 1e6:.0f} to {every_row[1] / 1e6:.0f} MB" in page


def ratio_to_slots(num_ranks: int, num_max_tokens: int = 4096, hidden: int = 7168) -> float:
    """Our window to R x M slots that hold nothing but a row of bfloat16."""
    return window_bytes(num_ranks, num_max_tokens, hidden, num_topk=8) / (num_ranks * num_max_tokens * 2 * hidden)


@given(num_ranks=st.integers(2, 14), num_max_tokens=st.integers(4096, 16384), hidden=st.integers(28, 64))
def test_a_window_is_smaller_than_a_slot_for_every_token_of_every_rank(
    num_ranks: int, num_max_tokens: int, hidden: int
) -> None:
    """Prefill, rows of 7 KiB and more; marks, labels and partial counts weigh more in smaller windows."""
    assert ratio_to_slots(num_ranks, num_max_tokens, 128 * hidden) < 1


def test_a_usual_size() -> None:
    """4096 tokens of 7168 bfloat16 on 8 ranks: what must be kept is 7 x 4096 rows, and a window is hardly more."""
    rows = 7 * 4096 * 7168 * 2
    assert rows < window_bytes(8, 4096, 7168, 8) < 1.06 * rows


@given(row_bytes=st.integers(1, 2048).map(lambda n: 16 * n), num_topk=TOPK, num_scales=st.integers(0, 512))
def test_records(row_bytes: int, num_topk: int, num_scales: int) -> None:
    sent, back = Record.of_dispatch(row_bytes, num_scales), Record.of_combine(row_bytes, num_topk)
    assert sent.tail_bytes >= 4 * num_scales
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
