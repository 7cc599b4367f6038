"""Moving a launch to another address space: what memory it works on, and where its arguments point into that memory."""

from __future__ import annotations

import bisect
import ctypes
import functools
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Region:
    """A stretch of one rank's memory that its kernel works on."""

    name: str  # for reports
    start: int  # address in the rank's own process
    data: bytes
    writable: bool
    home: int | None = None  # where it lies in the world; None: anywhere


@dataclass(frozen=True)
class Home:
    """Memory of a rank's own process that stands for a part of its window."""

    memory: torch.Tensor  # [bytes] uint8
    address: int  # in the world

    def of(self, start: int, end: int) -> int | None:
        """The world's address of what lies there in the process; None if that is elsewhere."""
        offset = start - self.memory.data_ptr()
        is_here = offset >= 0 and start < end <= self.memory.data_ptr() + self.memory.numel()
        return self.address + offset if is_here else None


@dataclass(frozen=True)
class Pointer:
    """A pointer inside the bytes of an argument structure that must be redirected."""

    args_offset: int
    region_idx: int
    region_offset: int


@dataclass(frozen=True)
class Request:
    """One rank's part of a launch."""

    args: bytes
    pointers: tuple[Pointer, ...]
    regions: tuple[Region, ...]


def pack(
    kernel_name: str,
    args: ctypes.Structure,
    reads: Sequence[torch.Tensor | None],
    writes: Sequence[torch.Tensor | None],
    is_window: Callable[[int], bool],
    homes: Sequence[Home] = (),
) -> Request:
    """Collect the bytes that a launch works on, and note where the arguments point into them.

    Args:
        homes: of memory that has a place in the world already, where peers look for it.

    Raises:
        ValueError: a pointer leads to neither a tensor of reads or writes nor a window.
        TypeError: a tensor is not on the CPU.
    """
    tensors = [(tensor, False) for tensor in reads] + [(tensor, True) for tensor in writes]
    spans = merge([(*span_of(tensor), writable) for tensor, writable in tensors if tensor is not None])
    starts = [start for start, _, _ in spans]
    names = ["memory"] * len(spans)
    pointers = []
    for path, offset in pointer_fields(type(args)):
        address = ctypes.c_uint64.from_buffer(args, offset).value
        if address == 0:
            continue
        span_idx = bisect.bisect_right(starts, address) - 1
        in_span = span_idx >= 0 and (address == starts[span_idx] or address < spans[span_idx][1])
        if in_span == is_window(address):  # both: the world's addresses and this process's are the same by bad luck
            where = "both a tensor and a window" if in_span else "no tensor of reads or writes and no window"
            raise ValueError(f"{path} of {kernel_name} points to {address:#x}, which is in {where}")
        if in_span:
            names[span_idx] = path
            pointers.append(Pointer(offset, span_idx, address - starts[span_idx]))
    regions = tuple(
        Region(
            name,
            start,
            ctypes.string_at(start, end - start),
            writable,
            next((at for home in homes if (at := home.of(start, end)) is not None), None),
        )
        for name, (start, end, writable) in zip(names, spans, strict=True)
    )
    return Request(bytes(args), tuple(pointers), regions)


def span_of(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses from a tensor's first byte to behind its last one, gaps between its rows included."""
    if tensor.device.type != "cpu":
        raise TypeError(f"simulated ranks work on CPU tensors, but a tensor is on {tensor.device}")
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def merge(spans: Iterable[tuple[int, int, bool]]) -> list[tuple[int, int, bool]]:
    """Join what overlaps, by address: memory that two tensors share must be one place in the world too."""
    merged: list[tuple[int, int, bool]] = []
    for start, end, writable in sorted(spans):
        if merged and (start < merged[-1][1] or start == merged[-1][0]):
            last_start, last_end, last_writable = merged[-1]
            merged[-1] = (last_start, max(last_end, end), last_writable or writable)
        else:
            merged.append((start, end, writable))
    return merged


@functools.cache
def pointer_fields(struct_type: type[ctypes.Structure]) -> tuple[tuple[str, int], ...]:
    """Path and byte offset of every c_void_p in a structure, through nested structures and arrays."""
    return tuple(_pointer_fields(struct_type, "", 0))


def _pointer_fields(kind: Any, path: str, offset: int) -> Iterator[tuple[str, int]]:
    if kind is ctypes.c_void_p:
        yield path, offset
    elif issubclass(kind, ctypes.Array):
        for i in range(kind._length_):
            yield from _pointer_fields(kind._type_, f"{path}[{i}]", offset + i * ctypes.sizeof(kind._type_))
    elif issubclass(kind, ctypes.Structure):
        for name, field_type, *_ in kind._fields_:
            field_path = f"{path}.{name}" if path else name
            yield from _pointer_fields(field_type, field_path, offset + getattr(kind, name).offset)


def redirect(request: Request, addresses: Sequence[int]) -> bytes:
    """A request's argument bytes with every noted pointer leading into the world."""
    args = bytearray(request.args)
    for pointer in request.pointers:
        struct.pack_into("<Q", args, pointer.args_offset, addresses[pointer.region_idx] + pointer.region_offset)
    return bytes(args)
