"""Code that was written for ElasticBuffer runs on ours by changing nothing (importers.py)."""

from __future__ import annotations

import pytest
import torch

from tests.elastic.importers import IMPORTERS
from tests.elastic.ranks import torchrun


def test_on_simulated_ranks() -> None:
    output = torchrun(2, "tests.elastic.importers").check()
    assert output.count(": OK") == len(IMPORTERS)


@pytest.mark.gpu
def test_on_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs in one NVLink domain, this host has {torch.cuda.device_count()}")
    output = torchrun(2, "tests.elastic.importers", "--machine", "cuda", CUDA_VISIBLE_DEVICES="0,1").check()
    assert output.count(": OK") == len(IMPORTERS)
