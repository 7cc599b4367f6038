#!/usr/bin/env python3
"""Make a copy of NCCL's library that is small enough to carry to another host.

    thin_nccl.py wheel/nvidia/nccl/lib/libnccl.so.2 libnccl.so.2.xz --sm 90

The library in the nvidia-nccl-cu13 wheel takes 250 to 350 MB, nearly all of it device code for other GPUs, relocatable
device code for linking and sections that only debuggers read. This overwrites those bytes with zeros, so that no offset
in the file moves, and compresses the result to 13 to 16 MB. Unpack it with xz; it loads as the original does, on GPUs
of the chosen architecture.
"""

from __future__ import annotations

import argparse
import lzma
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SECTION_IS_LOADED = 0x2  # SHF_ALLOC: the dynamic loader maps only sections that carry this flag
SECTION_HOLDS_NO_BYTES = 8  # SHT_NOBITS
FATBIN_MAGIC = 0xBA55ED50


@dataclass(frozen=True)
class Section:
    """A section of a 64-bit little-endian ELF file; offset and size are in bytes."""

    name: str
    offset: int
    size: int
    loaded: bool


def read_sections(elf: bytearray) -> list[Section]:
    """List the sections that occupy bytes in the file."""
    if elf[:6] != b"\x7fELF\x02\x01":
        raise SystemExit("not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", elf, 40)
    entry_size, count, names_idx = struct.unpack_from("<HHH", elf, 58)
    # name, type, flags, address, offset, size
    rows = [struct.unpack_from("<IIQQQQ", elf, table + idx * entry_size) for idx in range(count)]
    names = rows[names_idx][4]

    def name_at(offset: int) -> str:
        return elf[names + offset : elf.index(0, names + offset)].decode()

    return [
        Section(name_at(name), offset, size, loaded=bool(flags & SECTION_IS_LOADED))
        for name, kind, flags, _, offset, size in rows
        if kind != SECTION_HOLDS_NO_BYTES
    ]


def device_images(elf: bytearray, section: Section) -> Iterator[tuple[int, int, int]]:
    """Yield (architecture, offset, size) of every device image in the fat binaries of a section."""
    at, section_end = section.offset, section.offset + section.size
    while at + 16 <= section_end:
        magic, _, header_bytes, body_bytes = struct.unpack_from("<IHHQ", elf, at)
        if magic != FATBIN_MAGIC:  # padding between two fat binaries
            at += 8
            continue
        image, at = at + header_bytes, at + header_bytes + body_bytes
        while image < at:
            _, _, image_header_bytes, image_bytes = struct.unpack_from("<HHIQ", elf, image)
            (architecture,) = struct.unpack_from("<I", elf, image + 28)
            yield architecture, image + image_header_bytes, image_bytes
            image += image_header_bytes + image_bytes


def thin(elf: bytearray, architecture: int) -> int:
    """Blank what a host with one kind of GPU never reads; return how many bytes of device code are left."""
    kept = 0
    for section in read_sections(elf):
        unread = not section.loaded and section.name != ".shstrtab"
        if unread or section.name == "__nv_relfatbin":
            elf[section.offset : section.offset + section.size] = bytes(section.size)
        elif section.name == ".nv_fatbin":
            for image_architecture, offset, size in device_images(elf, section):
                if image_architecture == architecture:
                    kept += size
                else:
                    elf[offset : offset + size] = bytes(size)
    return kept


def main() -> None:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("original", type=Path, help="libnccl.so.2 of an nvidia-nccl-cu13 wheel")
    parser.add_argument("out", type=Path, help="the compressed copy to write")
    parser.add_argument("--sm", type=int, required=True, help="the architecture to keep: 90 for H100 and H200")
    args = parser.parse_args()

    elf = bytearray(args.original.read_bytes())
    kept = thin(elf, args.sm)
    if not kept:
        sys.exit(f"{args.original} holds no device code for sm_{args.sm}")
    args.out.write_bytes(lzma.compress(elf, preset=6))
    print(f"kept {kept / 1e6:.1f} MB of device code for sm_{args.sm}, wrote {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
