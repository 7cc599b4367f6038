"""The simulated machine itself: what it reports, and that a seed is a run."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from deep_ep import jit
from deep_ep.machine.world import Launch, SimulationError, World
from tests.device.bench import KERNELS, Probe, ProbeArgs, SimulatedBench
from tests.device.conftest import WorldKeeper
from tests.device.exchange import Exchange

MISUSES = re.findall(r"  k(\w+),", (KERNELS / "misuse.cuh").read_text())
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "simulator.md"
NO_WORDS = np.zeros(1, np.uint32)


def line_of(text: str, file: str = "misuse.cuh") -> str:
    """Where a kernel says this: "misuse.cuh:34"."""
    lines = (KERNELS / file).read_text().splitlines()
    (number,) = (i for i, line in enumerate(lines, 1) if text in line)
    return f"{file}:{number}"


def misuse(world: World, name: str, *, seed: int = 0, count: int = 16) -> str:
    """Run one of misuse.cuh's kernels; returns what the error says."""
    probe = Probe("misuse", [NO_WORDS, NO_WORDS], 16, variant=MISUSES.index(name), count=count, num_threads=64,
                  shared_bytes=2048, seed=seed)  # fmt: skip
    with pytest.raises(SimulationError) as caught:
        SimulatedBench(world).run(probe)
    assert caught.value.seed == seed
    assert f"seed {seed}" in str(caught.value)
    return str(caught.value)


def test_divergence_names_both_places(plain_worlds: WorldKeeper) -> None:
    text = misuse(plain_worlds.get(), "Divergence")
    assert "collective diverges" in text
    assert line_of("// here") in text
    assert line_of("// or there") in text


def test_deadlock_says_who_waits_for_what_and_where(plain_worlds: WorldKeeper) -> None:
    text = misuse(plain_worlds.get(), "Deadlock")
    assert "deadlock" in text
    for rank in (0, 1):
        assert f"rank {rank} block 0 threads 0: wait for peer 1 in phase 3: expects 5, sees 0" in text
        assert f"rank {rank} block 0 threads 1-63: wait for sync_block (63 of 64 threads are there)" in text
    assert line_of("d::wait_until_equals(") in text


def test_a_deadlock_leaves_the_world_usable(plain_worlds: WorldKeeper) -> None:
    world = plain_worlds.get()
    misuse(world, "Deadlock")
    assert world is plain_worlds.get()
    Exchange(world).run(seed=1)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("MissingArrival", "mbarrier (1 of 2 arrivals and 0 bytes outstanding in its phase of parity 0)"),
        ("BarrierCount", "barrier 2 is for"),
        ("ArriveTwice", "this thread arrives twice"),
        ("BulkOutOfBounds", "a bulk copy's destination is out of bounds: 32 bytes"),
        ("BulkMisaligned", "destination is not a multiple of 16: 32 bytes"),
        ("BulkSize", "a bulk copy or prefetch of 24 bytes"),
        ("PrefetchSize", "a bulk copy or prefetch of 24 bytes"),
        ("PrefetchOutOfBounds", "a bulk copy's source is out of bounds: 32 bytes"),
        ("UnfencedMbarrier", "run fence_mbarrier_init after the mbarrier_init at"),
        ("UninitialisedMbarrier", "an mbarrier that nobody initialised"),
        ("AtomicOnShared", "takes global memory only"),
        ("Uncommitted", "bulk stores that it never committed"),
        ("Unread", "leaves the kernel before its bulk store has read shared memory"),
        ("LoadUnderWay", "while this bulk load is under way into its shared memory"),
        ("MisalignedWord", "is not aligned to its 4 bytes"),
    ],
)
def test_misuse_is_reported_with_its_place(plain_worlds: WorldKeeper, name: str, says: str) -> None:
    for seed in range(40):  # what a copy engine may do early it may also do late: some seed shows it
        try:
            text = misuse(plain_worlds.get(), name, seed=seed)
        except pytest.fail.Exception:
            assert name in ("Unread", "LoadUnderWay")
            continue
        assert says in text
        assert re.search(r"misuse\.cuh:\d+", text)
        return
    pytest.fail("no seed showed it")


@pytest.mark.parametrize(("name", "says"), [("OutOfBounds", "past the end of"), ("BeforeBegin", "bytes before")])
def test_an_access_outside_any_region_ends_the_world(name: str, says: str) -> None:
    with World() as world:
        text = misuse(world, name, count=1500 if name == "BeforeBegin" else 128)
        assert "crash: Segmentation fault" in text
        assert says in text
        assert "'output of rank" in text
        assert "rank 0 block 0 thread 0" in text or "rank 1 block 0 thread 0" in text
        assert not world.is_alive
        with pytest.raises(SimulationError):
            world.allocate(16)


def test_the_document_shows_how_to_use_a_world(plain_worlds: WorldKeeper) -> None:
    """The snippet of docs/simulator.md as it stands there; for its kernel stands a probe."""
    probe = Probe("identity", [], 2 * 64 * 10, num_threads=64)
    world = plain_worlds.get()
    output = world.allocate(4 * probe.num_outputs, name="output")
    known = {
        "World": lambda: nullcontext(world),
        "Launch": lambda artifact, name, *rest, **more: Launch(artifact, probe.name, *rest, **more),
        "artifact": jit.build(probe.kernel, SimulatedBench(world).toolchain).artifact,
        "args": ProbeArgs(output=output),
    }
    (code,) = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    exec(code, known)
    assert len(known["data"]) == 4096
    blocks = np.frombuffer(world.read(output, 4 * probe.num_outputs), np.uint32).reshape(2, 64, 10)[..., 0]
    np.testing.assert_array_equal(blocks, [[0] * 64, [1] * 64])
    world.free(output)
    world.free(known["window"])


def test_a_small_overrun_is_found_after_the_launch(plain_worlds: WorldKeeper) -> None:
    world = plain_worlds.get()
    probe = Probe("misuse", [NO_WORDS], 1, variant=MISUSES.index("SmallOverrun"), count=6, shared_bytes=2048)
    with pytest.raises(SimulationError, match=r"bytes outside 'output of rank 0' .* at offset 6"):
        SimulatedBench(world).run(probe)


def test_gpu_scope_between_ranks_is_reported(plain_worlds: WorldKeeper) -> None:
    probe = Probe("message", [np.zeros(32, np.uint32)] * 2, 32, variant=0, count=1, num_blocks=2)
    with pytest.raises(SimulationError, match=r"gpu scope does not reach another rank: .* wrote at .*message.cuh:\d+"):
        SimulatedBench(plain_worlds.get()).run(probe)


def test_shared_memory_starts_poisoned(plain_worlds: WorldKeeper) -> None:
    probe = Probe("misuse", [NO_WORDS], 16, variant=MISUSES.index("Poison"), shared_bytes=2048)
    for seed in range(2):
        bench = SimulatedBench(plain_worlds.get())
        assert bench.run(Probe(**{**probe.__dict__, "seed": seed})).outputs[0][0] == 0xCBCBCBCB


def test_the_same_seed_is_the_same_run_in_any_process(plain_worlds: WorldKeeper) -> None:
    first = [Exchange(plain_worlds.get()).run(seed=seed) for seed in range(5)]
    with World() as world:
        again = [Exchange(world).run(seed=seed) for seed in range(5)]
    assert first == again
    assert len({report.num_steps for report in first}) > 1, "seeds differ"


def test_an_exchange_under_many_seeds(
    plain_worlds: WorldKeeper, record_property: Callable[[str, object], None]
) -> None:
    exchange = Exchange(plain_worlds.get())
    start = time.perf_counter()
    for seed in range(100):
        exchange.run(seed)
    milliseconds = (time.perf_counter() - start) / 100 * 1e3
    record_property("measured", f"exchange, 2 ranks x 2 blocks x 64 threads, plain: {milliseconds:.1f} ms a seed")


def test_delays_change_who_comes_first_and_nothing_else(plain_worlds: WorldKeeper) -> None:
    exchange = Exchange(plain_worlds.get())
    for rank in (0, 1):
        report = exchange.run(seed=3, delays={rank: 10_000_000})
        assert report.virtual_ns >= 10_000_000


def test_a_wait_without_a_partner_expires_if_asked(plain_worlds: WorldKeeper) -> None:
    exchange = Exchange(plain_worlds.get(), expected_epoch=2)
    with pytest.raises(SimulationError, match="in phase 7: expects 8, sees 4"):
        exchange.run(seed=0)
    faults = Exchange(plain_worlds.get(), expected_epoch=2).run_into_timeout(seed=0)
    for state, phase, _block, thread, peer, expected, seen, _ in faults:
        assert (state, phase, thread, peer, expected, seen) == (2, 7, 0, -1, 8, 4)


def test_requests_that_fit_no_kernel_are_refused(plain_worlds: WorldKeeper, tmp_path: Path) -> None:
    world = plain_worlds.get()
    kernel = Probe("identity", [NO_WORDS], 1).kernel
    artifact = jit.build(kernel, jit.Gxx(more_include_dirs=(KERNELS,))).artifact
    args = bytes(ProbeArgs())
    with pytest.raises(ValueError, match="takes 32 threads a block, not 64"):
        world.launch([Launch(artifact, "identity", args, 0, 1, 64, 0)], seed=0)
    with pytest.raises(ValueError, match="takes 40 bytes of arguments, not 39"):
        world.launch([Launch(artifact, "identity", args[1:], 0, 1, 32, 0)], seed=0)
    with pytest.raises(ValueError, match="no entry deep_ep_other"):
        world.launch([Launch(artifact, "other", args, 0, 1, 32, 0)], seed=0)
    with pytest.raises(ValueError, match="cannot be loaded"):
        world.launch([Launch(tmp_path / "kernel.so", "other", args, 0, 1, 32, 0)], seed=0)
    with pytest.raises(ValueError, match="patience"):
        world.launch([], seed=0, patience="never")  # type: ignore[arg-type]
    address = world.allocate(100, name="hundred")
    with pytest.raises(ValueError, match=r"8 bytes at .* offset 96 of 'hundred' \(100 bytes\), 4 bytes past its end"):
        world.read(address + 96, 8)
    world.free(address)
    with pytest.raises(ValueError, match="no region begins there"):
        world.free(address)


def test_memory_is_what_was_written(plain_worlds: WorldKeeper) -> None:
    world = plain_worlds.get()
    address = world.allocate(5 << 20, fill=7)
    data = np.random.default_rng(0).bytes(3 << 20)
    world.write(address + 11, data)
    assert address % 128 == 0
    assert world.read(address, 11) == b"\7" * 11
    assert world.read(address + 11, len(data)) == data
    world.free(address)


def test_a_failure_prints_how_to_run_it_again() -> None:
    with World(replay="python -m pytest tests/device -k deadlock --seed {seed}") as world:
        assert "replay: python -m pytest tests/device -k deadlock --seed 11" in misuse(world, "Deadlock", seed=11)


def test_an_endless_loop_ends_the_world() -> None:
    with World(timeout_s=1) as world:
        started = time.monotonic()
        text = misuse(world, "EndlessLoop")
        assert "took longer than 1 s" in text
        assert time.monotonic() - started < 30


def test_many_ranks(plain_worlds: WorldKeeper) -> None:
    n, ranks = 4 * 256, 16
    inputs = [np.full(n, rank, np.uint32) for rank in range(ranks)]
    probe = Probe("barriers", inputs, 2 * n, variant=3, count=2, num_blocks=4, num_threads=256,
                  window_bytes=128 + 4 * n)  # fmt: skip
    for rank, output in enumerate(SimulatedBench(plain_worlds.get()).run(probe).outputs):
        np.testing.assert_array_equal(output[:n], rank)
        np.testing.assert_array_equal(output[n:], rank + 1)
