"""Wrong arguments are told what is wrong with them, and leave nothing behind that the next call would trip over."""

from __future__ import annotations

import pytest
import torch

from tests.elastic.ranks import torchrun

# The validating mode, which looks at every index.
VALIDATING = {"EP_BUFFER_DEBUG": "1"}


def test_every_mistake_on_simulated_ranks() -> None:
    output = torchrun(2, "tests.elastic.bad_calls", **VALIDATING).check()
    assert output.count(" mistakes, 0 answered wrongly") == 2


@pytest.mark.gpu
def test_every_mistake_on_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs in one NVLink domain, this host has {torch.cuda.device_count()}")
    variables = {**VALIDATING, "CUDA_VISIBLE_DEVICES": "0,1"}
    output = torchrun(2, "tests.elastic.bad_calls", "--machine", "cuda", **variables).check()
    assert output.count(" mistakes, 0 answered wrongly") == 2


def test_small_case() -> None:
    """What compute-sanitizer runs on GPUs (scripts/gpu_host.sh) runs here on simulated ranks."""
    output = torchrun(2, "tests.elastic.small_case").check()
    assert "40 small round trips on 2 simulated ranks: OK" in output
