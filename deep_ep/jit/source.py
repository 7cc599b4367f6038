"""From a kernel's description to the few lines that the compiler sees.

The text stays in the cache beside what was built from it: it is the documentation of what ran.
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

LINE_LENGTH = 120
IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Kernel:
    """One kernel with all that is fixed at compile time; two equal kernels are the same machine code.

    Attributes:
        name: ``"dispatch"`` for the template ``deep_ep::dispatch<Config>(args)``; see also ``entry``.
        config: a frozen dataclass of ints, bools and enums; class and fields are named, and in the order, of the C++
            struct, and the value of an enum's member is the name of the C++ enumerator.
        args: the argument struct; its class is named as the C++ struct. Nested structs and arrays are allowed.
        num_threads: of a block.
        uses_nccl: whether the kernel includes NCCL's headers (only kernels that cross NVLink domains do).
        header: what to include; by default deep_ep/kernels/<name>.cuh.
    """

    name: str
    config: Any
    args: type[ctypes.Structure]
    num_threads: int
    uses_nccl: bool = False
    header: str | None = None

    @property
    def entry(self) -> str:
        """The name under which the built module exports the kernel."""
        return f"deep_ep_{self.name}"


def generate(kernel: Kernel) -> str:
    """The translation unit of a kernel.

    Raises:
        TypeError, ValueError: the description cannot be written as C++.
    """
    if not IDENTIFIER.fullmatch(kernel.name):
        raise ValueError(f"kernel name must be a C++ identifier, got {kernel.name!r}")
    args = kernel.args.__name__
    layout = "\n".join(_offset_assert(args, *field) for field in _fields(kernel.args))
    return f"""\
// The kernel "{kernel.name}", as deep_ep.jit wrote it for one configuration.
#include <{kernel.header or f"deep_ep/kernels/{kernel.name}.cuh"}>

using deep_ep::{args};

{_config_literal(kernel.config)}

// Python packs the arguments, C++ reads them: they agree on every byte.
static_assert(sizeof({args}) == {ctypes.sizeof(kernel.args)});
{layout}

EP_ENTRY({kernel.entry}, {kernel.num_threads}, {args}) {{
  deep_ep::{kernel.name}<kConfig>(args);
}}
"""


def _config_literal(config: Any) -> str:
    """``constexpr deep_ep::DispatchConfig kConfig{.num_sms = 16, ...};``, on one line if it fits."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"a kernel's config must be an instance of a dataclass, got {config!r}")
    items = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not isinstance(value, (int, enum.Enum)):
            kind = type(value).__name__
            raise TypeError(
                f"{type(config).__name__}.{field.name} must be an int, a bool or an enum, got {kind} {value!r}"
            )
        items.append(f".{field.name} = {_literal(value)}")
    head = f"constexpr deep_ep::{type(config).__name__} kConfig{{"
    line = f"{head}{', '.join(items)}}};"
    return line if len(line) <= LINE_LENGTH else head + "".join(f"\n    {item}," for item in items) + "\n};"


def _literal(value: int | enum.Enum) -> str:
    if isinstance(value, enum.Enum):
        return f"deep_ep::{type(value).__name__}::{value.value}"
    return str(value).lower() if isinstance(value, bool) else str(int(value))


def _fields(struct: type[ctypes.Structure], prefix: str = "", base: int = 0) -> Iterator[tuple[str, int, int]]:
    """(name, offset, bytes) of every field, those of nested structs included under dotted names."""
    for name, kind, *bits in struct._fields_:
        if bits:
            raise TypeError(f"{struct.__name__}.{name} is a bit-field; arguments have whole fields only")
        offset = base + int(getattr(struct, name).offset)
        yield prefix + name, offset, ctypes.sizeof(kind)
        if isinstance(kind, type) and issubclass(kind, ctypes.Structure):
            yield from _fields(kind, f"{prefix}{name}.", offset)


def _offset_assert(struct: str, field: str, offset: int, num_bytes: int) -> str:
    # The size as well: behind a 4-byte field that C++ takes for 8 bytes there is often padding, and no offset moves.
    return f"static_assert(EP_OFFSET({struct}, {field}) == {offset} && sizeof({struct}::{field}) == {num_bytes});"
