"""The generated translation units: what they say, that compilers accept them, that a layout mismatch is caught."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from deep_ep import jit
from deep_ep.errors import EPCompileError
from tests.unit.jit_kit import TINY_KERNEL, TinyArgs, TinyConfig, run_tiny, write_headers

GOLDEN = """\
// The kernel "tiny", as deep_ep.jit wrote it for one configuration.
#include <deep_ep/kernels/tiny.cuh>

using deep_ep::TinyArgs;

constexpr deep_ep::TinyConfig kConfig{.scale = 3, .twice = true};

// Python packs the arguments, C++ reads them: they agree on every byte.
static_assert(sizeof(TinyArgs) == 56);
static_assert(EP_OFFSET(TinyArgs, values) == 0 && sizeof(TinyArgs::values) == 8);
static_assert(EP_OFFSET(TinyArgs, range) == 8 && sizeof(TinyArgs::range) == 8);
static_assert(EP_OFFSET(TinyArgs, range.begin) == 8 && sizeof(TinyArgs::range.begin) == 4);
static_assert(EP_OFFSET(TinyArgs, range.end) == 12 && sizeof(TinyArgs::range.end) == 4);
static_assert(EP_OFFSET(TinyArgs, peers) == 16 && sizeof(TinyArgs::peers) == 32);
static_assert(EP_OFFSET(TinyArgs, offset) == 48 && sizeof(TinyArgs::offset) == 4);

EP_ENTRY(deep_ep_tiny, 32, TinyArgs) {
  deep_ep::tiny<kConfig>(args);
}
"""


def test_the_text_is_what_a_person_would_write() -> None:
    assert jit.generate(TINY_KERNEL) == GOLDEN


def test_a_long_config_has_one_field_a_line() -> None:
    @dataclass(frozen=True)
    class LongConfig:
        number_of_something_that_has_a_long_name: int = 1
        number_of_something_else_that_has_a_long_name: int = -2
        whether_something_holds: bool = False

    text = jit.generate(replace(TINY_KERNEL, config=LongConfig()))
    assert (
        "constexpr deep_ep::LongConfig kConfig{\n"
        "    .number_of_something_that_has_a_long_name = 1,\n"
        "    .number_of_something_else_that_has_a_long_name = -2,\n"
        "    .whether_something_holds = false,\n"
        "};\n"
    ) in text
    assert max(map(len, text.splitlines())) <= 120


def test_another_header_can_be_named() -> None:
    text = jit.generate(replace(TINY_KERNEL, header="deep_ep/kernels/several.cuh"))
    assert "#include <deep_ep/kernels/several.cuh>\n" in text


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"name": "not a name"}, ValueError, "must be a C\\+\\+ identifier, got 'not a name'"),
        ({"config": TinyConfig}, TypeError, "must be an instance of a dataclass"),
        (
            {"config": TinyConfig(scale=1.5)},
            TypeError,
            "must be an int, a bool or an enum, got float 1.5",
        ),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_written_is_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        jit.generate(replace(TINY_KERNEL, **change))  # type: ignore[arg-type]


def test_bit_fields_are_refused() -> None:
    class BitArgs(ctypes.Structure):
        _fields_ = [("bit", ctypes.c_int32, 1)]

    with pytest.raises(TypeError, match=r"BitArgs\.bit is a bit-field"):
        jit.generate(replace(TINY_KERNEL, args=BitArgs))


def test_the_simulated_kernel_reads_what_python_packed(tmp_path: Path) -> None:
    toolchain = jit.Gxx(more_include_dirs=write_headers(tmp_path))
    assert run_tiny(jit.build(TINY_KERNEL, toolchain, store=jit.Store(tmp_path / "cache"))) == [1, 7, 13, 19]


def _args_with(kind: type[ctypes._SimpleCData[int]]) -> type[ctypes.Structure]:
    *others, _ = TinyArgs._fields_
    return type("TinyArgs", (ctypes.Structure,), {"_fields_": [*others, ("offset", kind)]})


def test_a_drifted_argument_does_not_compile(tmp_path: Path) -> None:
    # The C++ field has 4 bytes and 4 of padding: size and offsets of the struct are the same, only the field differs.
    drifted = replace(TINY_KERNEL, args=_args_with(ctypes.c_int64))
    assert ctypes.sizeof(drifted.args) == ctypes.sizeof(TinyArgs)
    toolchain = jit.Gxx(more_include_dirs=write_headers(tmp_path))
    with pytest.raises(EPCompileError, match="static assertion failed"):
        jit.build(drifted, toolchain, store=jit.Store(tmp_path / "cache"))
