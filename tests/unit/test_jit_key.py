"""What a key depends on, and what not: everything that can change the machine code, and no path."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from deep_ep import jit
from deep_ep.environment import Environment
from deep_ep.jit.key import digest_of_headers, make_key, reached_headers
from tests.unit.jit_kit import TINY_KERNEL, FakeToolchain, write_headers

SOURCES = {"source.txt": b"#include <deep_ep/kernels/tiny.cuh>\n"}


@pytest.fixture
def toolchain(tmp_path: Path) -> FakeToolchain:
    (tmp_path / "library.so").write_bytes(b"library")
    return FakeToolchain(include_dirs=write_headers(tmp_path / "include"), libraries=(tmp_path / "library.so",))


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"version": "2"},
        {"architecture": "sm_100a"},
        {"flags": ("-O2",)},
        {"outputs": ("artifact.txt", "kernel.ptx")},
        {"libraries": ()},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_key_changes_with_the_toolchain(toolchain: FakeToolchain, change: dict[str, object]) -> None:
    assert make_key(replace(toolchain, **change), SOURCES) != make_key(toolchain, SOURCES)  # type: ignore[arg-type]


def test_the_key_changes_with_the_schema(toolchain: FakeToolchain, monkeypatch: pytest.MonkeyPatch) -> None:
    before = make_key(toolchain, SOURCES)
    monkeypatch.setattr("deep_ep.jit.key.SCHEMA", "another")
    assert make_key(toolchain, SOURCES) != before


def test_the_key_changes_with_sources_and_their_names(toolchain: FakeToolchain) -> None:
    text = SOURCES["source.txt"]
    keys = {make_key(toolchain, sources) for sources in (SOURCES, {"other.txt": text}, {"source.txt": text + b"//"})}
    assert len(keys) == 3


def test_parts_do_not_run_together(toolchain: FakeToolchain) -> None:
    one, two = replace(toolchain, flags=("-DA", "-DB")), replace(toolchain, flags=("-DA-DB",))
    assert make_key(one, SOURCES) != make_key(two, SOURCES)


def test_the_key_changes_with_every_header_that_can_be_reached(toolchain: FakeToolchain) -> None:
    keys = [make_key(toolchain, SOURCES)]
    (include,) = toolchain.include_dirs
    for header in ("deep_ep/kernels/tiny.cuh", "deep_ep/tiny_factor.cuh"):
        path = include / header
        path.write_text(path.read_text() + "// edited\n")
        keys.append(make_key(toolchain, SOURCES))
    assert len(set(keys)) == 3


def test_the_key_does_not_change_with_other_headers(toolchain: FakeToolchain) -> None:
    before = make_key(toolchain, SOURCES)
    (include,) = toolchain.include_dirs
    (include / "deep_ep" / "unrelated.cuh").write_text("// nobody includes this\n")
    assert make_key(toolchain, SOURCES) == before


def test_the_key_does_not_change_with_places(toolchain: FakeToolchain, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "include", tmp_path / "moved" / "include")
    shutil.copy(tmp_path / "library.so", tmp_path / "moved")
    environment = replace(toolchain.environment, jit_cache_dir=tmp_path / "elsewhere")
    moved = replace(
        toolchain,
        include_dirs=(tmp_path / "moved" / "include",),
        libraries=(tmp_path / "moved" / "library.so",),
        environment=environment,
    )
    assert make_key(moved, SOURCES) == make_key(toolchain, SOURCES)


def test_the_key_of_an_nccl_kernel_changes_with_nccls_headers(tmp_path: Path) -> None:
    sources = {"kernel.cu": b"#include <nccl_device.h>\n"}
    keys = []
    for version in ("1", "2"):
        include = tmp_path / version
        (include / "nccl_device").mkdir(parents=True)
        (include / "nccl_device.h").write_text('#include "nccl_device/core.h"\n')
        (include / "nccl_device" / "core.h").write_text(f"#define NCCL_VERSION {version}\n")
        keys.append(make_key(FakeToolchain(include_dirs=(include,)), sources))
    assert keys[0] != keys[1]


def test_headers_are_followed_through_quotes_brackets_and_parents(tmp_path: Path) -> None:
    for name, text in {
        "a/one.h": '#  include "two.h"\n#ifdef NEVER\n#include <b/three.h>\n#endif\n',
        "a/two.h": '#include "../b/three.h"\n#include <no_such_header>\n',
        "b/three.h": '#include "three.h"\n',
        "b/four.h": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert [name for name, _ in reached_headers([b"#include <a/one.h>\n"], [tmp_path])] == [
        "a/one.h",
        "a/two.h",
        "b/three.h",
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"jit_cpp_standard": 23},
        {"jit_with_lineinfo": True},
        {"jit_dump_ptx": True},
        {"jit_dump_sass": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_key_of_nvrtc_changes_with_what_the_environment_asks_for(change: dict[str, object]) -> None:
    sources = {"kernel.cu": b""}
    plain = jit.Nvrtc("sm_90a", environment=Environment())
    changed = jit.Nvrtc("sm_90a", environment=Environment(**change))  # type: ignore[arg-type]
    assert make_key(plain, sources) != make_key(changed, sources)


def test_the_key_of_nvcc_changes_with_the_flags_that_it_inherits(monkeypatch: pytest.MonkeyPatch) -> None:
    toolchain = jit.Nvcc("sm_90a")
    before = make_key(toolchain, {"kernel.cu": b""})
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-Xptxas=-O1")
    assert make_key(toolchain, {"kernel.cu": b""}) != before


def test_the_key_of_gxx_changes_with_its_options() -> None:
    options = [
        {},
        {"race_detector": True},
        {"defines": ("EP_BUG",)},
        {"artifact_name": "x.so"},
        {"more_flags": ("-O2",)},
    ]
    keys = {make_key(jit.Gxx(**option), {"kernel.cpp": b""}) for option in options}  # type: ignore[arg-type]
    assert len(keys) == len(options)


@pytest.mark.parametrize("toolchain", [jit.Nvrtc("sm_90a"), jit.Nvcc("sm_90a"), jit.Gxx()], ids=lambda t: t.name)
def test_flags_and_versions_hold_no_path(toolchain: jit.Toolchain) -> None:
    assert not [flag for flag in (*toolchain.flags, toolchain.name) if "/" in flag]
    assert "bin/" not in toolchain.version


def test_equal_kernels_have_equal_sources() -> None:
    assert jit.generate(TINY_KERNEL) == jit.generate(replace(TINY_KERNEL))


def test_the_digest_of_headers(tmp_path: Path) -> None:
    """What ranks compare: it follows the text and the names of headers, wherever they lie."""
    for name in ("here", "there"):
        (tmp_path / name / "phases").mkdir(parents=True)
        (tmp_path / name / "phases" / "admit.cuh").write_text("admit")
    digest = digest_of_headers(tmp_path / "here")
    assert digest == digest_of_headers(tmp_path / "there")
    assert len(digest) == 12
    (tmp_path / "there" / "phases" / "admit.cuh").write_text("admit all")
    assert digest != digest_of_headers(tmp_path / "there")
    (tmp_path / "here" / "phases" / "admit.cuh").rename(tmp_path / "here" / "admit.cuh")
    assert digest != digest_of_headers(tmp_path / "here")
