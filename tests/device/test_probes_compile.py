"""The probes compile for GPUs too, where there is no GPU: so that the GPU side of these tests cannot rot unseen."""

from __future__ import annotations

import numpy as np
import pytest

from deep_ep import jit
from tests.device.bench import KERNELS, Probe

VARIANTS = {
    "identity": 1,
    "warp": 1,
    "words": 1,
    "message": 7,
    "bulk": 3,
    "pipeline": 1,
    "relay": 1,
    "barriers": 6,
    "patience": 2,
    "convert": 4,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_probe_compiles_for_sm_90a(name: str) -> None:
    for variant in range(VARIANTS[name]):
        kernel = Probe(name, [np.zeros(1, np.uint32)], 1, variant=variant, num_threads=128).kernel
        built = jit.build(kernel, jit.Nvrtc("sm_90a", more_include_dirs=(KERNELS,)))
        assert built.resources is not None
        assert built.resources.spill_bytes == 0
