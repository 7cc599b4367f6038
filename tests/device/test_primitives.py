"""One test for each family of primitives: the same probe, the same oracle, on every machine."""

from __future__ import annotations

import numpy as np
import pytest

from tests.device import oracle
from tests.device.bench import Bench, Probe, Words
from tests.device.conftest import Seeds


def random_words(count: int, seed: int = 0, limit: int = 2**32) -> Words:
    return np.random.default_rng(seed).integers(0, limit, count, dtype=np.uint32)


def test_threads_know_who_they_are(bench: Bench, machine: str, seeds: Seeds) -> None:
    blocks, threads = 3, 96
    lanes_seen = set()
    for seed in seeds:
        probe = Probe("identity", [random_words(1)], 10 * blocks * threads, num_blocks=blocks, num_threads=threads,
                      shared_bytes=1024, seed=seed)  # fmt: skip
        table = bench.run(probe).outputs[0].reshape(blocks * threads, 10)
        thread = np.arange(blocks * threads) % threads
        expected = [np.arange(blocks * threads) // threads, np.full(blocks * threads, blocks), thread]
        expected += [np.full(blocks * threads, threads), thread // 32, np.full(blocks * threads, 3), thread % 32]
        np.testing.assert_array_equal(table[:, :7], np.stack(expected, axis=1))
        elected = table[:, 7].reshape(-1, 32)
        np.testing.assert_array_equal(elected.sum(axis=1), 1)
        lanes_seen |= set(elected.argmax(axis=1).tolist())
        np.testing.assert_array_equal(table[:, 8:], 1)
    assert len(lanes_seen) > 1 or machine != "simulated" or seeds.is_pinned, (
        "no kernel may rely on lane 0 being elected"
    )


def test_warp_collectives(bench: Bench, seeds: Seeds) -> None:
    for seed in seeds:
        values = random_words(128, seed, limit=2**32 if seed % 2 else 200)
        probe = Probe("warp", [values], 12 * 128, num_blocks=2, num_threads=64, seed=seed)
        np.testing.assert_array_equal(bench.run(probe).outputs[0].reshape(128, 12), oracle.warp(values))


def test_words_of_every_order_and_scope(bench: Bench, seeds: Seeds) -> None:
    n = 128
    for seed in seeds:
        values = random_words(n, seed, limit=1000)
        probe = Probe("words", [values], 24 * n, num_blocks=2, num_threads=64, shared_bytes=128,
                      window_bytes=128 + 32 * n, seed=seed)  # fmt: skip
        outcome = bench.run(probe)
        table = outcome.outputs[0].reshape(n, 24).astype(np.uint64)
        v = values.astype(np.uint64)
        small = np.frombuffer(outcome.windows[0][:16], np.uint32)
        wide = np.frombuffer(outcome.windows[0][64:96], np.uint64)
        total = int(v.sum())
        assert small.tolist() == [4 * total, 4 * total, n, 2 * total]
        assert wide.tolist() == [4 * total << 20, 4 * total << 20, n, 2 * total << 20]
        assert sorted(table[:, 0].tolist()) == list(range(n)), "every thread gets a ticket of its own"
        for k in range(5):
            np.testing.assert_array_equal(table[:, 1 + k], v + k)
        wide_out = table[:, 6:18:2] | table[:, 7:18:2] << np.uint64(32)
        assert sorted(wide_out[:, 0].tolist()) == list(range(n))
        for k in range(5):
            np.testing.assert_array_equal(wide_out[:, 1 + k], (v << np.uint64(20)) + k)
        np.testing.assert_array_equal(table[:, 18], 4 * v + 6)
        np.testing.assert_array_equal(table[:, 19], v + 7)
        np.testing.assert_array_equal(table[:, 20], v)
        for block in range(2):
            steps = (values[64 * block : 64 * (block + 1)] % 7).tolist()
            old = table[64 * block : 64 * (block + 1), 21].tolist()
            order = np.argsort(old, kind="stable")
            assert set(table[64 * block : 64 * (block + 1), 22].tolist()) == {sum(steps)}
            moved = [(old[i], steps[i]) for i in order if steps[i]]
            assert [before for before, _ in moved] == np.cumsum([0] + [step for _, step in moved])[:-1].tolist()


MESSAGES = ["store_gpu", "store_sys", "add", "fetch_add", "exchange", "fences", "pairs"]


@pytest.mark.parametrize("variant", range(7), ids=MESSAGES)
def test_messages_arrive_whole(bench: Bench, machine: str, seeds: Seeds, variant: int) -> None:
    rounds = 4
    num_ranks = 1 if machine == "cuda" or variant == 0 else 2  # gpu scope does not reach other ranks
    for seed in seeds:
        inputs = [random_words(32, seed * 2 + rank) for rank in range(num_ranks)]
        probe = Probe("message", inputs, 32 * rounds, variant=variant, count=rounds, num_blocks=2, seed=seed)
        for rank, output in enumerate(bench.run(probe).outputs):
            sent = inputs[(rank - 1) % num_ranks]
            expected = np.concatenate([sent + np.uint32(round_ + 1) for round_ in range(rounds)])
            np.testing.assert_array_equal(output, expected)


@pytest.mark.parametrize("variant", range(3), ids=["wait_read", "wait", "test"])
def test_bulk_copies(bench: Bench, seeds: Seeds, variant: int) -> None:
    rows = 13
    for seed in seeds:
        values = random_words(rows * 64, seed)
        probe = Probe("bulk", [values], rows * 64, variant=variant, count=rows, num_blocks=2, num_threads=64,
                      shared_bytes=2 * 2 * 384, seed=seed)  # fmt: skip
        np.testing.assert_array_equal(bench.run(probe).outputs[0], values + np.uint32(1))


def test_mbarriers_between_warps(bench: Bench, seeds: Seeds) -> None:
    rounds, blocks, consumers = 5, 2, 64
    for seed in seeds:
        values = random_words(rounds * 32, seed)
        probe = Probe("pipeline", [values], rounds * blocks * consumers, count=rounds, num_blocks=blocks,
                      num_threads=32 + consumers, shared_bytes=256, seed=seed)  # fmt: skip
        expected = np.tile(values.reshape(rounds, 32) * np.uint32(3), (1, blocks * consumers // 32))
        np.testing.assert_array_equal(bench.run(probe).outputs[0], expected.ravel())


def test_rows_travel_through_the_copy_engines(bench: Bench, machine: str, seeds: Seeds) -> None:
    num_ranks = 1 if machine == "cuda" else 2
    for seed in seeds:
        inputs = [random_words(128, seed * 2 + rank) for rank in range(num_ranks)]
        probe = Probe("relay", inputs, 128, num_blocks=2, shared_bytes=1024, seed=seed)
        for rank, output in enumerate(bench.run(probe).outputs):
            np.testing.assert_array_equal(output, inputs[(rank - 1) % num_ranks] * np.uint32(5))


@pytest.mark.parametrize("variant", range(5), ids=["warp", "named", "block", "grid", "cluster"])
def test_meetings_order_memory(bench: Bench, seeds: Seeds, variant: int) -> None:
    rounds, blocks, threads, cluster = 3, 4, 128, 2
    group = [32, 64, threads, threads * blocks, threads * cluster][variant]
    n = blocks * threads
    for seed in seeds:
        values = random_words(n, seed)
        probe = Probe("barriers", [values], rounds * n, variant=variant, count=rounds, num_blocks=blocks,
                      num_threads=threads, cluster_blocks=cluster if variant == 4 else 1, window_bytes=128 + 4 * n,
                      seed=seed)  # fmt: skip
        thread = np.arange(n)
        first = thread // group * group
        expected = [values[first + (thread - first + 33 + r) % group] + np.uint32(r) for r in range(rounds)]
        np.testing.assert_array_equal(bench.run(probe).outputs[0], np.concatenate(expected))


def test_arrivals_that_do_not_wait(bench: Bench, seeds: Seeds) -> None:
    rounds, n = 3, 128
    for seed in seeds:
        values = random_words(n, seed)
        probe = Probe("barriers", [values], rounds * n, variant=5, count=rounds, num_threads=n,
                      window_bytes=128 + 4 * n, seed=seed)  # fmt: skip
        pairs = values.reshape(2, 2, 32)
        brought = np.stack([pairs[:, 1], np.zeros_like(pairs[:, 1])], axis=1)  # even warps get, odd warps gave
        taken = np.stack([np.ones_like(pairs[:, 1]), np.zeros_like(pairs[:, 1])], axis=1)
        expected = np.concatenate([(brought + taken * np.uint32(r)).ravel() for r in range(rounds)])
        np.testing.assert_array_equal(bench.run(probe).outputs[0], expected)


def test_a_wait_that_times_out_leaves_a_record(bench: Bench, seeds: Seeds) -> None:
    for seed in seeds:
        probe = Probe("patience", [random_words(1)], 3, num_blocks=3, seed=seed, patience="expire")
        outcome = bench.run(probe)
        assert outcome.outputs[0].tolist() == [2, 2, 2]
        state, phase, block, thread, peer, expected, seen, _ = np.frombuffer(outcome.windows[0][:32], np.int32).tolist()
        (waited_ns,) = np.frombuffer(outcome.windows[0][32:40], np.uint64).tolist()
        assert (state, phase, thread, peer, expected, seen) == (2, 4, 0, 9, 3, 0)
        assert 0 <= block < 3
        assert waited_ns >= 1_000_000


def test_a_wait_that_ends_in_time_leaves_none(bench: Bench, seeds: Seeds) -> None:
    for seed in seeds:
        probe = Probe("patience", [random_words(1)], 3, variant=1, num_blocks=3, num_threads=64, seed=seed)
        outcome = bench.run(probe)
        assert outcome.outputs[0].tolist() == [1, 1, 1]
        assert outcome.windows[0][:40] == bytes(40)
