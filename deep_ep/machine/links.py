"""How fast a GPU's NVLink is, as NVML tells it. Never an error: the figure only helps to choose a number of SMs."""

from __future__ import annotations

import logging
from typing import Any

import torch

from deep_ep.machine import import_cuda_extra

logger = logging.getLogger("deep_ep")

# GB/s of one link in one direction, by major compute capability: NVLink 4 and NVLink 5.
GBS_OF_A_LINK = {9: 26.5625, 10: 53.125}


def wire_gbs(device: torch.device) -> float | None:
    """GB/s of all active links of a GPU together, in one direction; None where nobody can tell."""
    try:
        properties: Any = torch.cuda.get_device_properties(device)
        bus = f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
        num_links = count_links(import_cuda_extra("cuda.bindings.nvml"), bus)
        return GBS_OF_A_LINK[properties.major] * num_links or None
    except Exception as error:  # no NVML, an old binding, a container without rights, a GPU that is not in the table
        logger.debug("the speed of %s's NVLink is unknown: %s: %s", device, type(error).__name__, error)
        return None


def count_links(nvml: Any, bus: str) -> int:
    """Active links of the GPU at a PCI address ("00000000:1b:00.0")."""
    nvml.init_v2()
    try:
        handle = nvml.device_get_handle_by_pci_bus_id_v2(bus)
        return sum(_is_active(nvml, handle, link) for link in range(int(nvml.NVLINK_MAX_LINKS)))
    finally:
        nvml.shutdown()


def _is_active(nvml: Any, handle: int, link: int) -> bool:
    try:
        return bool(nvml.device_get_nvlink_state(handle, link))
    except Exception:  # a GPU that has fewer links than the library knows of
        return False
