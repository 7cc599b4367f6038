"""Registered memory: what is handed out of it, and where kernels are told that it lies."""

from __future__ import annotations

import gc
import sys

import pytest
import torch

from deep_ep import layout
from deep_ep.calls.registered import COPIED_BYTES, MOST_BYTES, WORD_BYTES, Registered
from tests.unit.fake_machine import FakeMachine, FakeMemory, build

KIB = 1 << 10
NO_WEIGHTS = ("topk_weights", None)


def of_bytes(num_bytes: int) -> tuple[Registered, torch.Tensor]:
    memory = torch.zeros(num_bytes, dtype=torch.uint8)
    return Registered(memory), memory


def offset(tensor: torch.Tensor, memory: torch.Tensor) -> int:
    return tensor.data_ptr() - memory.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.int32])
def test_tensors_lie_apart_and_aligned(dtype: torch.dtype) -> None:
    registered, memory = of_bytes(64 * KIB)
    end = 0
    for size in ([3, 40], (7,), [0, 16], [], torch.Size([2, 3, 8])):
        tensor = registered.empty(size, dtype)
        assert (tensor.shape, tensor.dtype) == (torch.Size(size), dtype)
        assert tensor.is_contiguous()
        if tensor.numel() == 0:
            continue
        start = offset(tensor, memory)
        assert start % layout.REGION_ALIGNMENT == 0
        assert start >= end
        end = start + tensor.numel() * tensor.element_size()
        assert end <= memory.numel()
        tensor.view(-1).view(torch.uint8).fill_(1)
    assert memory.sum() == sum(size * dtype.itemsize for size in (3 * 40, 7, 0, 1, 2 * 3 * 8)), "nobody shares a byte"


def test_the_last_byte_is_handed_out_and_none_twice() -> None:
    """Whether or not what is left is a multiple of anything."""
    for num_bytes in (4 * KIB, 4 * KIB + 32):
        registered, memory = of_bytes(num_bytes)
        registered.empty([4 * KIB - 16], torch.uint8)  # some bytes behind it are lost to alignment
        left = num_bytes - 4 * KIB
        assert registered.empty([left], torch.uint8).numel() == left
        with pytest.raises(ValueError, match=rf"of the buffer's num_registered_bytes={num_bytes} only 0 are left; "):
            registered.empty([1], torch.uint8)
        assert registered.empty([0], torch.uint8).numel() == 0
        assert memory.numel() == num_bytes


def test_who_asks_for_too_much_takes_nothing() -> None:
    registered, _ = of_bytes(KIB)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"tensor \[2, 512\] of torch.bfloat16 takes 2048 bytes.* only 1024 are left"
        ):
            registered.empty([2, 512], torch.bfloat16)
    registered.empty([512], torch.bfloat16)


def test_kernels_are_told_places_in_words() -> None:
    registered, memory = of_bytes(64 * KIB)
    registered.empty([5], torch.float32)
    x, sf = registered.empty([6, 64], torch.float8_e4m3fn), registered.empty([6, 4], torch.int32)
    told = registered.place(("x", x), ("sf", sf))
    assert (told.rows * WORD_BYTES, told.row_words * WORD_BYTES) == (offset(x, memory), 64)
    assert (told.beside * WORD_BYTES, told.beside_words) == (offset(sf, memory), 4)
    told = registered.place(("x", x[2:]), NO_WEIGHTS)
    assert told.rows * WORD_BYTES == offset(x, memory) + 2 * 64
    assert (told.beside, told.beside_words) == (0, 0)


def test_the_last_row_may_end_where_the_memory_ends() -> None:
    registered, _ = of_bytes(KIB)
    x = registered.empty([4, 128], torch.bfloat16)
    assert registered.place(("x", x), NO_WEIGHTS).rows == 0
    beyond = x.as_strided((4, 128), (128, 1), x.storage_offset()).view(torch.uint8)
    assert registered.place(("x", beyond[3:]), NO_WEIGHTS).rows * WORD_BYTES == 3 * 256


def test_a_rank_without_tokens_has_them_anywhere() -> None:
    """It has no rows, and nobody reads them: an ordinary tensor without elements will do."""
    registered, _ = of_bytes(KIB)
    told = registered.place(("x", torch.empty(0, 64, dtype=torch.bfloat16)), ("topk_weights", torch.empty(0, 2)))
    assert (told.rows, told.beside) == (0, 0)


def test_what_peers_could_not_read_is_refused() -> None:
    registered, memory = of_bytes(64 * KIB)
    x = registered.empty([6, 64], torch.bfloat16)
    elsewhere = "must lie in this buffer's registered memory for zero_copy"
    straddling = torch.zeros(2 * KIB, dtype=torch.uint8)  # begins before its memory and ends in it
    inside = Registered(straddling[KIB:])
    for owner, tensor in (
        (registered, torch.zeros(6, 64, dtype=torch.bfloat16)),
        (inside, straddling.view(2, KIB)),
        (inside, straddling[: KIB + 16].view(1, -1)),
        (Registered(straddling[:KIB]), straddling[KIB - 16 :].view(1, -1)),
    ):
        with pytest.raises(ValueError, match=f"^x {elsewhere}"):
            owner.place(("x", tensor), NO_WEIGHTS)
    with pytest.raises(ValueError, match=f"^sf {elsewhere}"):
        registered.place(("x", x), ("sf", torch.zeros(6, 4)))
    gaps = f"must be contiguous and start at a multiple of {COPIED_BYTES} bytes for zero_copy"
    for tensor in (x[:, :32], x.view(64, 6).t(), x.view(-1)[4:68].view(1, 64)):
        with pytest.raises(ValueError, match=f"^x {gaps}"):
            registered.place(("x", tensor), NO_WEIGHTS)
    with pytest.raises(ValueError, match="build the buffer with num_registered_bytes"):
        Registered(memory[:0]).place(("x", x), NO_WEIGHTS)


def test_what_resize_has_moved_is_refused() -> None:
    """They share one storage, which moves with any of them."""
    registered, _ = of_bytes(64 * KIB)
    x, y = registered.empty([6, 64], torch.bfloat16), registered.empty([6, 64], torch.bfloat16)
    y.resize_(64, KIB)
    for tensor in (x, y, registered.empty([6, 64], torch.bfloat16)):
        with pytest.raises(ValueError, match=r"^x is not in this buffer's registered memory any more: resize_\(\)"):
            registered.place(("x", tensor), NO_WEIGHTS)


def test_words_reach_all_of_it() -> None:
    """A place is told in 32 bits."""
    assert (MOST_BYTES - COPIED_BYTES) // WORD_BYTES < 1 << 32 <= MOST_BYTES // WORD_BYTES


def test_a_buffer_hands_out_what_it_was_built_with(machine: FakeMachine) -> None:
    buffer = build(num_registered_bytes=KIB)
    assert buffer._end().layout["registered"].num_bytes == KIB
    assert buffer.registered_empty([4, 64]).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="only 512 are left"):
        buffer.registered_empty([1025], torch.uint8)
    assert f"{KIB:>14,}  registered " in buffer.memory_report()
    assert buffer.memory_report().endswith(f"{machine.window.num_bytes:>14,}  in all")


def test_a_destroyed_buffer_keeps_no_memory(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever still holds the buffer, which on GPUs would hold all of its window."""
    held = bytearray(KIB)
    alone = sys.getrefcount(held)
    monkeypatch.setattr(FakeMemory, "part", lambda *_: torch.frombuffer(held, dtype=torch.uint8))
    buffer = build(num_registered_bytes=KIB)
    assert sys.getrefcount(held) > alone
    buffer.destroy()
    monkeypatch.undo()
    gc.collect()
    assert sys.getrefcount(held) == alone
