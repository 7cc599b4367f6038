"""A buffer on a machine that launches nothing (fake_machine.py)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from deep_ep import ElasticBuffer
from deep_ep.calls import endpoint
from tests.unit.fake_machine import FakeMachine, build


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMachine]:
    machine = FakeMachine()
    monkeypatch.setattr(endpoint, "open_machine", lambda group, environment, limits: machine)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield machine
    dist.destroy_process_group()


@pytest.fixture
def buffer(machine: FakeMachine) -> ElasticBuffer:
    return build()
