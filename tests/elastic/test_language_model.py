"""Training and decoding, as a user runs them: examples/train_moe.py and decode.py in processes of their own."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tests.elastic.test_example import ROOT, TORCHRUN, run

EXAMPLES = ROOT / "examples"
TRAIN, DECODE = str(EXAMPLES / "train_moe.py"), str(EXAMPLES / "decode.py")
TINY = ("--steps", "24", "--sequences", "3", "--context", "32")  # two ranks share three sequences: unevenly


def check_training(output: str, title: str) -> None:
    """What the example's docstring promises, and that something is learned."""
    *steps, last = output.splitlines()
    losses = [re.fullmatch(r"step +\d+: loss (\d+\.\d+)", line) for line in steps]
    assert all(losses), output
    first, *_, trained = (float(match[1]) for match in losses if match)
    assert trained < first - 1, output
    assert re.fullmatch(rf"{re.escape(title)}: largest difference from one rank's losses 0\.\d+, OK", last), output


def check_decoding(output: str, title: str, steps: str, num_bytes: int) -> None:
    *_, speed, same, last = output.splitlines()
    assert re.fullmatch(rf"\d+ {steps}: \d+ bytes a second", speed), output
    chosen = re.fullmatch(rf"{re.escape(title)}: (\d+) of {num_bytes} bytes are those that one rank chooses", same)
    assert chosen, output
    assert int(chosen[1]) > 0.9 * num_bytes, output
    words = rf"{re.escape(title)}: largest difference from one rank's logits 0\.\d+ of the largest, OK"
    assert re.fullmatch(words, last), output


DRAWS = all(importlib.util.find_spec(name) for name in ("rich", "matplotlib"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what training over two simulated ranks leaves: model.pt, bar.txt and, if drawn, loss.png."""
    folder = tmp_path_factory.mktemp("trained")
    looks = ("--plot", str(folder / "loss.png")) if DRAWS else ("--plain",)
    done = run(TRAIN, "--ranks", "2", *TINY, *looks, "--save", str(folder / "model.pt"))
    assert done.returncode == 0, done.stdout + done.stderr
    check_training(done.stdout, "2 ranks, simulated machine")
    (folder / "bar.txt").write_text(done.stderr)
    return folder


@pytest.mark.skipif(not DRAWS, reason="rich or matplotlib is not installed")
def test_draws_the_curves(trained: Path) -> None:
    assert "24/24" in (trained / "bar.txt").read_text()
    picture = (trained / "loss.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(picture) > 20_000


def test_decodes_what_was_trained(trained: Path) -> None:
    done = run(*TORCHRUN, "2", DECODE, "--model", str(trained / "model.pt"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^rank 1: '.*' -> '.*'$", done.stdout, re.MULTILINE), done.stdout
    check_decoding(done.stdout, "2 ranks, simulated machine", "steps made call by call", num_bytes=2 * 2 * 16)


def wrong(tmp_path: Path, example: str, *lines: str) -> str:
    """A script that spoils something and then runs the example."""
    script = tmp_path / "wrong.py"
    start = ("import runpy, sys, torch, deep_ep", "from deep_ep import autograd, ElasticBuffer")
    end = (f"sys.path.insert(0, {str(EXAMPLES)!r})", f"runpy.run_path({example!r}, run_name='__main__')")
    script.write_text("\n".join([*start, *lines, *end]))
    return str(script)


def test_training_without_the_routers_gradient_is_not_ok(tmp_path: Path) -> None:
    """The comparison can fail: weights that carry no gradient change the loss by little, and by enough."""
    script = wrong(
        tmp_path,
        TRAIN,
        "dispatch = autograd.dispatch",
        "def wrong(buffer, x, topk_idx=None, topk_weights=None, **rest):",
        "    weights = None if topk_weights is None else topk_weights.detach() + 0 * topk_weights",
        "    return dispatch(buffer, x, topk_idx, weights, **rest)",
        "autograd.dispatch = wrong",
    )
    done = run(*TORCHRUN, "2", script, *TINY, "--plain")
    assert done.returncode != 0
    assert "FAILED: more than 0.0108" in done.stdout, done.stdout + done.stderr


def test_decoding_with_rows_in_each_others_place_is_not_ok(tmp_path: Path, trained: Path) -> None:
    """So can this one: on one rank, two texts' rows change places where they go by a handle."""
    script = wrong(
        tmp_path,
        DECODE,
        "dispatch = ElasticBuffer.dispatch",
        "def wrong(self, x, *rest, handle=None, **more):",
        "    swap = handle is not None and self.rank_idx == 1",
        "    return dispatch(self, x.flip(0) if swap else x, *rest, handle=handle, **more)",
        "ElasticBuffer.dispatch = wrong",
    )
    done = run(*TORCHRUN, "2", script, "--model", str(trained / "model.pt"))
    assert done.returncode != 0
    assert "FAILED: more than 0.0117" in done.stdout, done.stdout + done.stderr


def test_says_what_is_wrong(tmp_path: Path) -> None:
    no_bar = wrong(tmp_path, TRAIN, "sys.modules['rich'] = None")
    for command, message in (
        ((TRAIN, "--ranks", "3"), "--experts 8 is not a multiple of the 3 ranks"),
        ((no_bar,), "cannot be imported: pip install '.[examples]', or use --plain"),
        ((DECODE, "--ranks", "3"), "--ranks 3 does not divide the model's 8 experts"),
        ((DECODE, "--model", str(tmp_path / "none")), "is not a file; train_moe.py --save"),
        ((DECODE, "--model", "README.md"), "README.md is not what train_moe.py --save has left (UnpicklingError)"),
    ):
        done = run(*command)
        assert done.returncode == 2, done.stdout + done.stderr
        assert message in done.stderr


@pytest.mark.gpu
def test_on_gpus(tmp_path: Path) -> None:
    """Training, then decoding by a CUDA graph and without one."""
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs in one NVLink domain, this host has {torch.cuda.device_count()}")
    num_gpus = max(size for size in (2, 4, 8) if size <= torch.cuda.device_count())  # they share eight experts
    gpus, model = ",".join(map(str, range(num_gpus))), tmp_path / "moe.pt"
    title = f"{num_gpus} ranks, {torch.cuda.get_device_name()}"
    options = ("--hidden", "256", "--sequences", "32", "--steps", "60", "--plain", "--save", str(model))
    done = run(*TORCHRUN, str(num_gpus), TRAIN, *options, gpus=gpus)
    assert done.returncode == 0, done.stdout + done.stderr
    check_training(done.stdout, title)
    num_bytes = num_gpus * 8 * (64 - 16)
    for steps, more in (("replays of a CUDA graph", ()), ("steps made call by call", ("--eager",))):
        done = run(*TORCHRUN, str(num_gpus), DECODE, "--model", str(model), "--texts", "8", *more, gpus=gpus)
        assert done.returncode == 0, done.stdout + done.stderr
        check_decoding(done.stdout, title, steps, num_bytes)
