"""Another library under the same import name is noticed before it can do harm."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from deep_ep import installation
from deep_ep.errors import EPEnvironmentError


@pytest.fixture(autouse=True)
def _ask_again() -> Iterator[None]:
    installation.check.cache_clear()
    yield
    installation.check.cache_clear()


def test_this_checkout_is_alone() -> None:
    installation.check()


def refused(text: str) -> None:
    with pytest.raises(EPEnvironmentError, match=re.escape(text)) as caught:
        installation.check()
    assert "pip uninstall -y deep_ep deep_ep_cpp; pip install 'deep_ep[cu13]'" in str(caught.value)


def test_its_extension_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep_ep_cpp.py").touch()  # found like any module, never loaded
    monkeypatch.syspath_prepend(tmp_path)
    refused(f"the module deep_ep_cpp ({tmp_path / 'deep_ep_cpp.py'})")


def test_its_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = tmp_path / "deep_ep-2.0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: deep_ep\nVersion: 2.0.1\n")
    (metadata / "RECORD").write_text("deep_ep/__init__.py,,\ndeep_ep/engine.cpython-311-x86_64-linux-gnu.so,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    refused(f"version 2.0.1 with {tmp_path}/deep_ep/engine.cpython-311")


def test_our_own_distribution_is_none_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = tmp_path / "deep_ep-0.0.9.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: deep_ep\nVersion: 0.0.9\n")
    (metadata / "RECORD").write_text("deep_ep/__init__.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    installation.check()


def test_its_files_among_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "buffers").mkdir()
    (tmp_path / "buffers" / "engine.so").touch()
    monkeypatch.setattr(installation, "PACKAGE", tmp_path)
    refused(f"the extension {tmp_path}/buffers/engine.so")
