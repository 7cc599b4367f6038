"""Compiling before there is a group, and without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import deep_ep
from deep_ep import EPEnvironmentError, jit
from deep_ep.ops import all_kernels


def test_all_kernels_are_compiled_for_whom_they_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EP_JIT_CACHE_DIR", str(tmp_path))
    built: list[tuple[str, str]] = []

    def build(kernel: jit.Kernel, toolchain: Any) -> None:
        built.append((str(kernel), toolchain.architecture))

    monkeypatch.setattr("deep_ep.jit.builder.build", build)
    assert deep_ep.precompile("sm_100a") == len(all_kernels("cuda"))
    assert sorted(built) == sorted((str(kernel), "sm_100a") for kernel in all_kernels("cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_architecture_has_to_be_named() -> None:
    with pytest.raises(EPEnvironmentError, match=r"no GPU whose architecture .* name one: precompile\('sm_90a'\)"):
        deep_ep.precompile()


def test_an_architecture_has_a_form() -> None:
    with pytest.raises(TypeError, match="architecture must be a str such as 'sm_90a', but it is a int"):
        deep_ep.precompile(90)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"architecture must look like 'sm_90a' .* but it is 'hopper'"):
        deep_ep.precompile("hopper")
