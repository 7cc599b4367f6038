"""Fixtures of the probes: a bench per machine, and seeds that `--seed` can pin."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deep_ep.machine.world import World
from tests.device.bench import Bench, CudaBench, SimulatedBench


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="run simulations under this seed only")


class Seeds:
    """Seeds to run one after the other; a test that fails says which one it was, and how to run it again."""

    def __init__(self, request: pytest.FixtureRequest, machine: str) -> None:
        count = {"simulated": 25, "race": 5, "cuda": 3}[machine]
        pinned = request.config.getoption("--seed", default=None)
        self.is_pinned = pinned is not None
        self.range = range(count) if pinned is None else range(pinned, pinned + 1)
        self._node = request.node

    def __iter__(self) -> Iterator[int]:
        others = list(self._node.user_properties)
        for seed in self.range:
            command = f"python -m pytest '{self._node.nodeid}' --seed {seed}"
            self._node.user_properties[:] = [*others, ("seed", seed), ("command", command)]
            yield seed
        self._node.user_properties[:] = others


class WorldKeeper:
    """Worlds to share between tests: a new one only when the last has ended (a race or a crash ends it)."""

    def __init__(self, race_detector: bool) -> None:
        self._race_detector = race_detector
        self._world: World | None = None

    def get(self) -> World:
        if self._world is None or not self._world.is_alive:
            self.close()
            self._world = World(race_detector=self._race_detector)
        return self._world

    def close(self) -> None:
        if self._world is not None:
            self._world.close()


@pytest.fixture(scope="session")
def plain_worlds() -> Iterator[WorldKeeper]:
    keeper = WorldKeeper(race_detector=False)
    yield keeper
    keeper.close()


@pytest.fixture(scope="session")
def race_worlds() -> Iterator[WorldKeeper]:
    keeper = WorldKeeper(race_detector=True)
    yield keeper
    keeper.close()


@pytest.fixture(
    params=[
        pytest.param("simulated"),
        pytest.param("race", marks=pytest.mark.race),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def machine(request: pytest.FixtureRequest) -> str:
    """Where a probe runs."""
    return str(request.param)


@pytest.fixture
def bench(machine: str, plain_worlds: WorldKeeper, race_worlds: WorldKeeper) -> Bench:
    if machine == "cuda":
        return CudaBench()
    return SimulatedBench((race_worlds if machine == "race" else plain_worlds).get())


@pytest.fixture
def seeds(request: pytest.FixtureRequest, machine: str) -> Seeds:
    """Many schedules in simulation, a few with the race detector, a few repetitions on a GPU."""
    return Seeds(request, machine)
