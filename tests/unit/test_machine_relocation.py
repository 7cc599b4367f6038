"""What memory a launch works on, and where its arguments point into that memory."""

from __future__ import annotations

import ctypes

import pytest
import torch

from deep_ep.machine.relocation import Home, Pointer, merge, pack, pointer_fields, redirect, span_of


class Peers(ctypes.Structure):
    _fields_ = (("count", ctypes.c_int), ("base", ctypes.c_void_p * 3))


class Args(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("num_rows", ctypes.c_int),
        ("peers", Peers),
        ("pairs", Peers * 2),
        ("y", ctypes.c_void_p),
        ("clock", ctypes.c_uint64),
    )


def never_a_window(address: int) -> bool:
    return False


def test_pointers_are_found_in_nested_structures_and_arrays() -> None:
    fields = dict(pointer_fields(Args))
    assert list(fields) == [
        "x",
        *(f"peers.base[{i}]" for i in range(3)),
        *(f"pairs[{pair}].base[{i}]" for pair in range(2) for i in range(3)),
        "y",
    ]
    args = Args()
    for path, offset in fields.items():
        ctypes.c_uint64.from_buffer(args, offset).value = 0xABC0 + offset
        assert eval(f"args.{path}", {"args": args}) == 0xABC0 + offset


@pytest.mark.parametrize(
    ("shape", "stride", "num_bytes"),
    [
        ((3, 4), (4, 1), 48),
        ((3, 4), (8, 1), 80),
        ((3, 4), (1, 3), 48),
        ((5,), (0,), 4),
        ((), (), 4),
        ((0, 4), (4, 1), 0),
    ],
)
def test_a_span_holds_every_element_and_the_gaps(
    shape: tuple[int, ...], stride: tuple[int, ...], num_bytes: int
) -> None:
    tensor = torch.zeros(100, dtype=torch.int32).as_strided(shape, stride)
    start, end = span_of(tensor)
    assert (start, end - start) == (tensor.data_ptr(), num_bytes)


def test_only_overlapping_spans_are_joined() -> None:
    spans = [(20, 30, False), (0, 10, False), (5, 12, True), (12, 15, False), (40, 40, False), (40, 44, True)]
    assert merge(spans) == [(0, 12, True), (12, 15, False), (20, 30, False), (40, 44, True)]


def test_pointers_lead_to_the_same_bytes_elsewhere() -> None:
    x, y = torch.arange(12, dtype=torch.int32), torch.zeros(4, dtype=torch.bfloat16)
    args = Args(x=x[3:].data_ptr(), y=y.data_ptr(), num_rows=7)
    args.peers.base[1] = 0x5000  # in a window
    args.pairs[1].base[2] = x.data_ptr()
    request = pack("copy", args, [x], [y], lambda address: address == 0x5000)

    regions = {region.name: region for region in request.regions}
    assert regions["pairs[1].base[2]"].data == x.numpy().tobytes()
    assert not regions["pairs[1].base[2]"].writable
    assert regions["y"].writable
    assert {pointer.region_offset for pointer in request.pointers} == {0, 12}

    addresses = [0x10000 * (1 + region_idx) for region_idx in range(len(request.regions))]
    there = Args.from_buffer_copy(redirect(request, addresses))
    x_idx = next(i for i, region in enumerate(request.regions) if region.start == x.data_ptr())
    assert there.x == addresses[x_idx] + 12
    assert there.pairs[1].base[2] == addresses[x_idx]
    assert there.y == addresses[1 - x_idx]
    assert there.peers.base[1] == 0x5000
    assert there.peers.base[0] is None
    assert there.num_rows == 7


def test_two_views_of_the_same_memory_stay_one_place() -> None:
    storage = torch.arange(16, dtype=torch.int32)
    even, odd = storage[::2], storage[1::2]
    request = pack("copy", Args(x=even.data_ptr(), y=odd.data_ptr()), [even], [odd], never_a_window)
    (region,) = request.regions
    assert region.writable
    assert request.pointers == (Pointer(Args.x.offset, 0, 0), Pointer(Args.y.offset, 0, 4))


def test_an_empty_tensor_needs_no_memory() -> None:
    empty = torch.zeros(8, dtype=torch.int32)[4:4]
    request = pack("copy", Args(x=empty.data_ptr()), [empty], [], never_a_window)
    assert [region.data for region in request.regions] == [b""]


def test_a_home_has_the_place_of_all_that_lies_in_it() -> None:
    storage = torch.zeros(96, dtype=torch.uint8)
    home, start = Home(storage[16:80], 0x7000), storage.data_ptr() + 16
    assert home.of(start, start + 64) == 0x7000
    assert home.of(start + 48, start + 64) == 0x7030
    for outside in ((start - 1, start + 8), (start, start + 65), (start + 64, start + 68), (start - 16, start)):
        assert home.of(*outside) is None
    assert home.of(start + 8, start + 8) is None, "nothing lies nowhere"


def test_what_has_a_home_goes_there() -> None:
    """Where peers look for it; all else goes anywhere."""
    memory, elsewhere = torch.arange(64, dtype=torch.uint8), torch.zeros(4)
    homes = (Home(torch.zeros(64, dtype=torch.uint8), 0x100), Home(memory, 0x7000))
    x, y = memory[16:32], memory[24:48]
    request = pack("copy", Args(x=x.data_ptr(), y=y.data_ptr()), [x, elsewhere], [y], never_a_window, homes)
    by_start = {region.start: region for region in request.regions}
    both = by_start[x.data_ptr()]
    assert (both.home, both.writable, len(both.data)) == (0x7010, True, 32)
    assert by_start[elsewhere.data_ptr()].home is None
    there = Args.from_buffer_copy(redirect(request, [region.home or 0x10000 for region in request.regions]))
    assert (there.x, there.y) == (0x7010, 0x7018)


def test_a_pointer_that_leads_nowhere_is_named() -> None:
    x = torch.zeros(4)
    args = Args(x=x.data_ptr())
    args.peers.base[2] = x.data_ptr() + 16  # one past the end
    with pytest.raises(ValueError, match=r"^peers\.base\[2\] of copy points to 0x.* no tensor of reads or writes"):
        pack("copy", args, [x], [], never_a_window)


def test_a_pointer_into_a_window_and_a_tensor_at_once_is_refused() -> None:
    x = torch.zeros(4)
    with pytest.raises(ValueError, match="both a tensor and a window"):
        pack("copy", Args(x=x.data_ptr()), [x], [], lambda address: True)


def test_tensors_of_another_device_are_refused() -> None:
    with pytest.raises(TypeError, match="CPU tensors, but a tensor is on meta"):
        span_of(torch.zeros(4, device="meta"))
