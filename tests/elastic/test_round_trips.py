"""Dispatch and combine through the public class on several ranks: what they return is the oracle's, to the bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.elastic import lives, mishaps
from tests.elastic.ranks import torchrun


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "covering", "seeds", "largest"),
    [
        (1, ":", "0:20", 24),
        (2, ":", "100:130", 24),
        (3, "0:16", "150:150", 24),
        (4, "16:36", "200:208", 24),
        (8, "36:41", "300:302", 12),
        (16, "41:43", "400:400", 4),
    ],
)
def test_simulated_ranks(
    num_ranks: int, covering: str, seeds: str, largest: int, record_property: Callable[[str, object], None]
) -> None:
    """Any two choices together, all of them or some; and some at random."""
    record_property("seeds", seeds)
    options = ("--covering", covering, "--seeds", seeds, "--largest", str(largest), "--check-memory")
    output = torchrun(num_ranks, "tests.elastic.worker", *options).check()
    assert f"{num_ranks} simulated ranks: OK" in output


def test_indices_of_32_bits() -> None:
    options = ("--seeds", "500:510", "--largest", "12")
    torchrun(2, "tests.elastic.worker", *options, EP_NUM_TOPK_IDX_BITS="32").check()


@pytest.mark.slow
def test_ways_of_use() -> None:
    """Subgroups, several buffers, gaps between rows, streams and events, handles used again (ways.py)."""
    torchrun(3, "tests.elastic.ways").check()


def test_lives() -> None:
    """Buffers that go on one rank before they do on others (lives.py)."""
    output = torchrun(2, "tests.elastic.lives").check()
    assert output.count(": OK") == len(lives.LIVES), output


@pytest.mark.slow
def test_mishaps() -> None:
    """Ranks out of step, and ranks that come late, call something else, run out of memory or die (mishaps.py)."""
    output = torchrun(3, "tests.elastic.mishaps").check()
    assert output.count(": OK") == len(mishaps.MISHAPS), output


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_mishaps_on_gpus(num_ranks: int) -> None:
    """Of three ranks, which share the two GPUs, two go on after a death."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs in one NVLink domain, this host has {torch.cuda.device_count()}")
    variables = {"CUDA_VISIBLE_DEVICES": "0,1", "NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    output = torchrun(num_ranks, "tests.elastic.mishaps", "--machine", "cuda", **variables).check()
    assert output.count(": OK") == len(mishaps.MISHAPS), output


@pytest.mark.gpu
@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
        {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "EP_AVOID_RECORD_STREAM": "1"},
        {"EP_REUSE_NCCL_COMM": "0", "EP_USE_NVIDIA_TOOLS": "1"},
    ],
    ids=lambda variables: " ".join(variables) or "plain",
)
def test_ways_of_use_on_gpus(variables: dict[str, str]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs in one NVLink domain, this host has {torch.cuda.device_count()}")
    torchrun(2, "tests.elastic.ways", "--machine", "cuda", CUDA_VISIBLE_DEVICES="0,1", **variables).check()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "variables",
    [{}, {"EP_AVOID_RECORD_STREAM": "1"}, {"EP_NUM_TOPK_IDX_BITS": "32"}],
    ids=lambda variables: " ".join(variables) or "plain",
)
def test_any_two_choices_on_gpus(variables: dict[str, str]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs in one NVLink domain, this host has {torch.cuda.device_count()}")
    options = ("--machine", "cuda", "--covering", ":", "--check-memory")
    output = torchrun(2, "tests.elastic.worker", *options, CUDA_VISIBLE_DEVICES="0,1", **variables).check()
    assert "2 cuda ranks: OK" in output


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_thousand_round_trips_on_gpus() -> None:
    """Whatever is drawn, results are right, and memory stays what it is."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs in one NVLink domain, this host has {torch.cuda.device_count()}")
    options = ("--machine", "cuda", "--seeds", "10000:20000", "--check-memory")
    output = torchrun(2, "tests.elastic.worker", *options, timeout_s=580, CUDA_VISIBLE_DEVICES="0,1").check()
    assert "10000 round trips on 2 cuda ranks: OK" in output


@pytest.mark.gpu
@pytest.mark.parametrize(("num_ranks", "seeds", "largest"), [(2, "0:40", 200), (8, "100:140", 24)])
def test_ranks_on_two_gpus(
    num_ranks: int, seeds: str, largest: int, record_property: Callable[[str, object], None]
) -> None:
    """Eight ranks share the two GPUs: slow, and as good a test of correctness as eight GPUs."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs in one NVLink domain, this host has {torch.cuda.device_count()}")
    record_property("seeds", seeds)
    # Rows of up to 16 KiB: a stage of a GPU's rings holds a quarter of one.
    options = ("--machine", "cuda", "--seeds", seeds, "--largest", str(largest), "--longest", "8192")
    variables = {"CUDA_VISIBLE_DEVICES": "0,1"} | ({"NCCL_MULTI_RANK_GPU_ENABLE": "1"} if num_ranks > 2 else {})
    output = torchrun(num_ranks, "tests.elastic.worker", *options, **variables).check()
    assert f"{num_ranks} cuda ranks: OK" in output
