"""The main job of this project, as a user runs it: examples/moe_layer.py in processes of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "moe_layer.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def run(*command: str, gpus: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run python on simulated ranks (no GPU is visible unless named)."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def check(done: subprocess.CompletedProcess[str], num_ranks: int, num_tokens: int, machine: str) -> None:
    """Hold the output against what the example's docstring promises, and its figures against each other."""
    assert done.returncode == 0, done.stdout + done.stderr
    *reports, last = done.stdout.splitlines()
    assert last == f"{num_ranks} ranks, {num_tokens} tokens, {machine}: largest difference 0.0, OK"

    pattern = r"rank (\d+): (\d+) tokens; sent to each rank ([\d, ]+); received (\d+); each expert got ([\d, ]+)"
    found = [re.fullmatch(pattern, report) for report in reports]
    ranks = [match.groups() for match in found if match]
    assert [int(rank) for rank, *_ in ranks] == list(range(num_ranks)), done.stdout
    assert sum(int(tokens) for _, tokens, *_ in ranks) == num_tokens
    sent = [[int(count) for count in to_each.split(", ")] for _, _, to_each, _, _ in ranks]
    received = [int(count) for _, _, _, count, _ in ranks]
    assert [sum(column) for column in zip(*sent, strict=True)] == received


def test_starts_its_own_ranks() -> None:
    done = run(str(EXAMPLE), "--ranks", "4", "--max-tokens", "600", "--hidden", "64")
    check(done, num_ranks=4, num_tokens=600, machine="simulated machine")


def test_under_torchrun_with_another_file(tmp_path: Path) -> None:
    """Any bytes will do, and a token count that the ranks cannot share evenly."""
    file = tmp_path / "bytes"
    file.write_bytes(bytes(range(256)) + b"odd")
    done = run(*TORCHRUN, "2", str(EXAMPLE), "--file", str(file), "--experts", "6", "--topk", "3", "--hidden", "72")
    check(done, num_ranks=2, num_tokens=259, machine="simulated machine")


def test_indices_of_32_bits() -> None:
    done = run(str(EXAMPLE), "--ranks", "2", "--max-tokens", "64", "--hidden", "64", EP_NUM_TOPK_IDX_BITS="32")
    check(done, num_ranks=2, num_tokens=64, machine="simulated machine")


def test_more_ranks_than_tokens(tmp_path: Path) -> None:
    file = tmp_path / "short"
    file.write_bytes(b"hi")
    check(run(str(EXAMPLE), "--file", str(file), "--hidden", "64"), 4, 2, "simulated machine")


def test_says_what_is_wrong(tmp_path: Path) -> None:
    for options, message in (
        (["--ranks", "0"], "--ranks must be at least 1, but it is 0"),
        (["--max-tokens", "-5"], "--max-tokens must be at least 1, but it is -5"),
        (["--hidden", "60"], "--hidden 60 is not a multiple of 8"),
        (["--ranks", "3"], "--experts 16 is not a multiple of the 3 ranks"),
        (["--topk", "17"], "--topk 17 is not between 1 and the 16 experts"),
        (["--file", str(tmp_path / "none")], "is not a file with something in it"),
    ):
        done = run(str(EXAMPLE), *options)
        assert done.returncode == 2
        assert message in done.stderr


@pytest.mark.gpu
def test_on_gpus() -> None:
    import torch

    num_gpus = torch.cuda.device_count()
    gpus = ",".join(map(str, range(num_gpus)))
    done = run(*TORCHRUN, str(num_gpus), str(EXAMPLE), "--hidden", "1024", gpus=gpus)
    check(done, num_gpus, 4096, torch.cuda.get_device_name())


def test_a_wrong_sum_is_not_ok(tmp_path: Path) -> None:
    """The comparison can fail: with one bit of one result turned over, the exit code is 1 and the line says FAILED."""
    script = tmp_path / "wrong.py"
    script.write_text(
        "import runpy, sys, torch, deep_ep\n"
        "combine = deep_ep.ElasticBuffer.combine\n"
        "def wrong(self, x, handle):\n"
        "    result, *rest = combine(self, x, handle)\n"
        "    result.view(torch.int16)[0, 0] ^= 1\n"
        "    return result, *rest\n"
        "deep_ep.ElasticBuffer.combine = wrong\n"
        f"sys.path.insert(0, {str(EXAMPLE.parent)!r})\n"
        f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')\n"
    )
    done = run(*TORCHRUN, "2", str(script), "--max-tokens", "64", "--hidden", "64")
    assert done.returncode != 0
    assert "FAILED" in done.stdout
