"""The speed of NVLink, from a made-up NVML; whatever goes wrong, the answer is "unknown" and no error."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deep_ep.errors import EPEnvironmentError
from deep_ep.machine import links

GPU = torch.device("cuda", 3)


class FakeNvml:
    """18 links are known of, of which the GPU has some, and some of those are active."""

    NVLINK_MAX_LINKS = 18

    def __init__(self, active: int, existing: int) -> None:
        self.active, self.existing = active, existing
        self.num_open = 0

    def init_v2(self) -> None:
        self.num_open += 1

    def shutdown(self) -> None:
        self.num_open -= 1

    def device_get_handle_by_pci_bus_id_v2(self, bus: str) -> int:
        assert bus == "00000001:1b:02.0"
        return 77

    def device_get_nvlink_state(self, handle: int, link: int) -> int:
        assert handle == 77
        if link >= self.existing:
            raise RuntimeError("no such link")
        return int(link < self.active)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    properties = SimpleNamespace(major=9, pci_domain_id=1, pci_bus_id=0x1B, pci_device_id=2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return properties


def answer(monkeypatch: pytest.MonkeyPatch, nvml: Any) -> float | None:
    monkeypatch.setattr(links, "import_cuda_extra", lambda module: nvml)
    return links.wire_gbs(GPU)


@pytest.mark.parametrize(
    ("major", "active", "existing", "gbs"),
    [
        (9, 18, 18, 478.125),
        (9, 8, 12, 212.5),
        (10, 18, 18, 956.25),
        (9, 0, 18, None),
        (9, 0, 0, None),
        (12, 18, 18, None),
    ],
)
def test_active_links_count(
    monkeypatch: pytest.MonkeyPatch, gpu: SimpleNamespace, major: int, active: int, existing: int, gbs: float | None
) -> None:
    gpu.major = major
    nvml = FakeNvml(active, existing)
    assert answer(monkeypatch, nvml) == gbs
    assert nvml.num_open == 0


def test_nothing_that_goes_wrong_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str) -> None:
        raise EPEnvironmentError("there is no NVML")

    monkeypatch.setattr(links, "import_cuda_extra", missing)
    assert links.wire_gbs(GPU) is None

    nvml = FakeNvml(18, 18)
    monkeypatch.setattr(nvml, "device_get_handle_by_pci_bus_id_v2", lambda bus: 1 // 0)
    assert answer(monkeypatch, nvml) is None
    assert nvml.num_open == 0, "given back"
    assert answer(monkeypatch, object()) is None, "a binding without these functions"


def test_the_real_binding_has_what_is_asked_of_it() -> None:
    nvml = pytest.importorskip("cuda.bindings.nvml")
    for name in dir(FakeNvml):
        if not name.startswith("_"):
            assert hasattr(nvml, name), name
