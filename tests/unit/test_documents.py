"""The pages keep their word: whatever they show is run, and protocol.md names every region, phase and wait.

A snippet that is new fails a test here until somebody runs it. Python is run elsewhere: README.md's by test_readme.py,
guide.md's functions by tests/elastic/ways.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from deep_ep import layout
from tests.unit.test_tidy import INCLUDE, NOUNS_AMONG_PHASES

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = {path.stem: path for path in (ROOT / "examples").glob("*.py")}
LANGUAGES = {"python", "sh", "text", ""}  # the last two are no code
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text()

# Python that is not in README.md and is no function of guide.md: how it begins -> the test that runs it.
PYTHON_RUN_BY = {
    "buffer = ElasticBuffer(group, num_max_tokens_per_rank=4096": "tests/elastic/ways.py",
    "with World() as world:": "tests/device/test_engine.py",
    "from deep_ep.layout import labels_bytes": "tests/unit/test_layout.py",
}


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Yield (language, code) of what stands between fences."""
    text = page.read_text()
    assert text.count("```") % 2 == 0, f"{page.name} has a fence that nothing closes"
    yield from re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands() -> Iterator[str]:
    """Every line of every sh block, and those in the examples' docstrings, without what explains them."""
    for page in PAGES:
        for language, code in blocks(page):
            if language == "sh":
                yield from (re.split(r"\s{2,}#|\s+# ", line)[0].strip() for line in code.splitlines())
    for path in EXAMPLES.values():
        found = re.findall(r"^    ((?:python|torchrun) .*?)(?:\s{2,}.*)?$", path.read_text(), re.MULTILINE)
        yield from found


COMMANDS = sorted(set(commands()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_snippet_of_python_is_run(page: Path) -> None:
    for language, code in blocks(page):
        assert language in LANGUAGES, f"{page.name} has a block of {language}; one of {LANGUAGES} says who runs it"
        if language != "python" or page.name == "README.md":
            continue
        compile(code, page.name, "exec")
        functions = re.findall(r"^def (\w+)", code, re.MULTILINE)
        for name in functions:
            called = f'guide["{name}"](' in (ROOT / "tests/elastic/ways.py").read_text()
            assert page.name == "guide.md", f"{page.name} shows {name}: only guide.md's functions are run"
            assert called, f"{page.name} shows {name}, which what_the_guide_shows in tests/elastic/ways.py does not run"
        if not functions:
            runners = [runner for start, runner in PYTHON_RUN_BY.items() if code.startswith(start)]
            assert len(runners) == 1, f"nobody runs this snippet of {page.name}:\n{code}"
            assert page.name in (ROOT / runners[0]).read_text(), f"{runners[0]} does not speak of {page.name}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_would_run(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What it names is there, and takes the options; examples are run by tests/elastic."""
    program, *words = itertools.dropwhile(lambda word: re.match(r"[A-Z]+=", word), shlex.split(command))
    if program == "make":
        subprocess.run(["make", "--dry-run", *words], cwd=ROOT, check=True, capture_output=True)
    elif program == "pip":
        extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
        asked = [name for word in words for names in re.findall(r"^\.\[([\w,]+)\]$", word) for name in names.split(",")]
        assert words[0] == "install"
        assert set(asked) <= extras
    elif program.startswith("scripts/"):
        subprocess.run(["bash", "-n", program], cwd=ROOT, check=True)
        assert os.access(ROOT / program, os.X_OK)
        for option in (word for word in words if word.startswith("--")):
            assert option in (ROOT / program).read_text(), f"{program} knows no {option}"
    else:
        parse(program, words, monkeypatch, tmp_path)


def parse(program: str, words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let an example read its options, as it is started there."""
    assert program in ("python", ".venv/bin/python", "torchrun"), f"nobody runs {program}"
    if program == "torchrun":
        assert words[:2] == ["--standalone", "--nproc-per-node"]
        monkeypatch.setenv("WORLD_SIZE", words[2])
        words = words[3:]
    script, *options = words
    module = example(Path(script).stem, monkeypatch)
    assert script == f"examples/{Path(script).name}"
    for name in ("README.md", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    if "--model" in options:  # what train_moe.py would have left
        model = example("moe_model", monkeypatch)
        model.ByteModel(model.Config(8, experts=8, topk=2, context=64)).save(tmp_path / "moe.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(module, "find_spec", lambda name: name, raising=False)
    module.parse_options()


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module(name)


def test_a_new_snippet_is_noticed(tmp_path: Path) -> None:
    """The rules above can fail: pages that hold something that nobody runs."""
    page = tmp_path / "guide.md"
    for snippet in ("```python\ndef unheard_of():\n    pass\n```\n", "```python\nx = 1\n```\n", "```bash\nls\n```\n"):
        page.write_text(snippet)
        with pytest.raises(AssertionError):
            test_every_snippet_of_python_is_run(page)


def test_a_wrong_command_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for command in (
        "rm -r .",
        "pip install '.[cu99]'",
        "scripts/gpu_host.sh --never",
        "python examples/moe_layer.py --never",
        "make nothing",
    ):
        failures: Any = (AssertionError, SystemExit, subprocess.CalledProcessError)
        (folder := tmp_path / command[:4]).mkdir(exist_ok=True)
        with pytest.raises(failures):
            test_every_command_would_run(command, monkeypatch, folder)


def table(first: str) -> list[list[str]]:
    """The rows of protocol.md's tables whose first column is called so."""
    found = re.findall(rf"^\| {first} \|[^\n]*\n\|[-|]+\|\n((?:\|[^\n]*\n)+)", PROTOCOL, re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split("|")] for rows in found for row in rows.splitlines()]


def test_the_protocol_has_every_region() -> None:
    regions = layout.window_layout(8, 64 << 20).regions
    assert [row[0] for row in table("region")] == [region.name for region in regions]


def test_the_protocol_has_every_phase() -> None:
    """Each header of phases/ is a row of a call's table, or a verb that the text names."""
    rows = {row[0].partition(" (")[0] for row in table("phase")}
    headers = {path.stem for path in (INCLUDE / "phases").glob("*.cuh") if path.name not in NOUNS_AMONG_PHASES}
    named = {word for word in headers if f"*{word}*" in PROTOCOL or f"`phases/{word}.cuh`" in PROTOCOL}
    assert headers - rows - named == set()
    in_code = " ".join(path.read_text() for path in INCLUDE.rglob("*.cuh"))
    assert all(re.search(rf"\b{row}\b", in_code) for row in rows), f"of {rows}, some are no phase any more"


def test_the_protocol_has_every_wait() -> None:
    """What the record of a fault may say stands in the tables."""
    names = re.findall(r"constexpr uint32_t k(\w+) =", (INCLUDE / "wire" / "phase.cuh").read_text())
    waits = {re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower() for name in names}
    assert waits - {"differ"} <= {row[0].partition(" (")[0] for row in table("phase")}
    assert "## When somebody does something else" in PROTOCOL  # that is what "differ" is about
