"""README.md keeps its word: its commands and its code run, its links lead somewhere.

`make test` is not run from inside itself; what stands behind it is what runs this test.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SIMULATED = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines()]


def test_two_commands_do_all_the_set_up() -> None:
    assert commands()[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("command", [command for command in commands() if command.startswith("make ")])
def test_make_knows_the_target(command: str) -> None:
    done = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ci_runs_the_same() -> None:
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make test"


@pytest.mark.slow
def test_demo_prints_what_the_readme_shows() -> None:
    """The recipe of `make demo`, with the interpreter that runs this test, so that no second environment is made."""
    recipe = subprocess.run(["make", "--dry-run", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (command,) = (line.split() for line in recipe.splitlines() if line.startswith(".venv/bin/python examples/"))
    done = subprocess.run([sys.executable, *command[1:]], cwd=ROOT, env=SIMULATED, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (promised,) = blocks("text")
    assert done.stdout.splitlines()[-1] == promised.strip()


@pytest.mark.parametrize("code", blocks("python"))
def test_code_runs_on_simulated_ranks(code: str, tmp_path: Path) -> None:
    script = tmp_path / "from_the_readme.py"
    script.write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, str(script)], cwd=ROOT, env=SIMULATED, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"rank [01] received \d+ tokens, \[", done.stdout)) == 2, done.stdout


def test_torchrun_lines_name_files_that_exist() -> None:
    for command in commands():
        for script in re.findall(r"\S+\.py\b", command):
            assert (ROOT / script).is_file(), command


def test_installed_extras_exist() -> None:
    extras = set(re.findall(r"^(\w+) = \[$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    for command in commands():
        for names in re.findall(r"'\.\[([\w,]+)\]'", command):
            assert set(names.split(",")) <= extras, command


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{page} links to {target}, which is not there"
