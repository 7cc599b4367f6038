"""scripts/gpu_host.sh on a host without anything: what it starts is there, and it says what became of each step."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_host.sh"


def run(tmp_path: Path, *arguments: str, program: str = "exit 0") -> subprocess.CompletedProcess[str]:
    """Run the script with a python3 and a compute-sanitizer that are this shell program."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("python3", "compute-sanitizer"):
        (tools / name).write_text(f"#!/bin/sh\n{program}\n")
        (tools / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")}
    command = [str(SCRIPT), "--carried", str(tmp_path), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def table(output: str) -> dict[str, str]:
    lines = output.split("\nstep ")[1].splitlines()[1:-1]
    found = [re.fullmatch(r"(\w+) +host +(.+?) +\d+ s", line) for line in lines]
    return {match[1]: match[2] for match in found if match}


@pytest.fixture
def steps(tmp_path: Path) -> dict[str, str]:
    """Steps and their groups."""
    lines = run(tmp_path, "--list").stdout.split("\n")
    return {line.split()[0]: line.split()[1] for line in lines if line}


def test_every_step_runs(tmp_path: Path, steps: dict[str, str]) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert table(done.stdout) == dict.fromkeys(steps, "passed")


def test_what_is_started_exists() -> None:
    text = SCRIPT.read_text()
    modules = {f"tests.elastic.{job}" for job in re.findall(r"(?:\{ |^  |=\S+ )elastic (\w+)", text, re.MULTILINE)}
    modules |= set(re.findall(r"-m ((?:tests|benchmarks)\.[\w.]*\w)", text))
    scripts = {Path(path) for path in re.findall(r"(?:tests|examples)/\w[\w/]*\.py", text)}
    assert {"tests.elastic.ways", "tests.elastic.worker", "tests.elastic.bad_calls", "benchmarks.ep"} <= modules
    for path in scripts | {Path(module.replace(".", "/") + ".py") for module in modules}:
        assert (ROOT / path).is_file(), f"scripts/gpu_host.sh starts {path}, which is not there"


def test_groups_and_names(tmp_path: Path, steps: dict[str, str]) -> None:
    done = run(tmp_path, "speed", "ways")
    assert list(table(done.stdout)) == [*(step for step, group in steps.items() if group == "speed"), "ways"]
    unknown = run(tmp_path, "everything")
    assert (unknown.returncode, "no step or group 'everything'" in unknown.stderr) == (2, True)


def test_a_failure_is_told_and_the_others_run(tmp_path: Path) -> None:
    done = run(tmp_path, "ways", "worlds", "bench", program='case "$*" in *.ways*) echo broken; exit 3 ;; esac')
    assert done.returncode == 1
    assert table(done.stdout) == {"ways": "FAILED (3)", "worlds": "FAILED (3)", "bench": "passed"}
    assert "broken" in done.stdout


def test_what_takes_too_long_is_stopped(tmp_path: Path) -> None:
    """In time for the table; a long log is cut in the middle."""
    program = "head -c 1000000 /dev/zero | tr '\\0' x | fold -w 100; sleep 60"
    done = run(tmp_path, "--within", "2", "mishaps", "bench", program=program)
    assert done.returncode == 1
    assert table(done.stdout) == {"mishaps": "TIMED OUT", "bench": "no time"}
    assert 500_000 < (tmp_path / "out" / "gpu_host.log").stat().st_size < 700_000


@pytest.mark.parametrize(
    ("where", "verdict"),
    [
        ("at deep_ep_dispatch+0x1230", "FAILED (1)"),
        ("at deep_ep::collect(const deep_ep::Window &)+0x40 in collect.cuh:33", "FAILED (1)"),
        ("at void at::native::vectorized_gather_kernel<(int)16, long>(char *)+0x2f0", "passed"),
    ],
)
def test_initcheck_fails_for_our_kernels_alone(tmp_path: Path, where: str, verdict: str) -> None:
    report = f"========= Uninitialized __global__ memory read of size 4 bytes\n=========     {where}\n"
    done = run(tmp_path, "initcheck", program=f"printf '{report}'")
    assert table(done.stdout) == {"initcheck": verdict}, done.stdout
