"""kernels/exchange.cuh between two simulated ranks, with its oracle: a small protocol to plant bugs in."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from deep_ep import jit
from deep_ep.machine.world import Launch, Report, World
from tests.device.bench import KERNELS

NUM_RANKS, NUM_BLOCKS, NUM_THREADS = 2, 2, 64


@dataclass(frozen=True)
class ExchangeConfig:
    num_ranks: int = NUM_RANKS
    num_tokens: int = 12
    token_bytes: int = 512


class ExchangeArgs(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("slot", ctypes.c_void_p),
        ("recv", ctypes.c_void_p * NUM_RANKS),
        ("arrived", ctypes.c_void_p * NUM_RANKS),
        ("y", ctypes.c_void_p),
        ("fault", ctypes.c_void_p),
        ("timeout_ns", ctypes.c_uint64),
        ("rank", ctypes.c_int32),
        ("epoch", ctypes.c_int32),
    ]


class Exchange:
    """One world's exchanges.

    Args:
        bug: a macro of kernels/exchange.cuh, planted.
        expected_epoch: 1 is right; 2 waits for arrivals that never come.
    """

    def __init__(self, world: World, bug: str = "", expected_epoch: int = 1) -> None:
        self.world = world
        self.config = ExchangeConfig()
        self.epoch = expected_epoch
        kernel = jit.Kernel("exchange", self.config, ExchangeArgs, NUM_THREADS, header="exchange.cuh")
        toolchain = jit.Gxx(
            race_detector=world.race_detector, defines=(bug,) if bug else (), more_include_dirs=(KERNELS,)
        )
        self.artifact = jit.build(kernel, toolchain).artifact
        self._regions: list[int] = []

    def run(self, seed: int, delays: Mapping[int, int] | None = None) -> Report:
        """One exchange of random tokens to random ranks, checked."""
        try:
            return self._run(seed, delays)
        finally:
            self._free()

    def run_into_timeout(self, seed: int) -> list[list[int]]:
        """Returns each rank's fault record, as int32 words without the waiting time."""
        try:
            launches, _, _, faults = self._prepare(random.Random(seed), timeout_ns=10**6)
            self.world.launch(launches, seed=seed, patience="expire")
            return [np.frombuffer(self.world.read(fault, 32), np.int32).tolist() for fault in faults]
        finally:
            self._free()

    def _run(self, seed: int, delays: Mapping[int, int] | None) -> Report:
        chance = random.Random(seed)
        launches, expected, outputs, _ = self._prepare(chance, timeout_ns=0)
        report = self.world.launch(launches, seed=seed, delays=delays)
        for rank, output in enumerate(outputs):
            got = self.world.read(output, NUM_RANKS * self.config.num_tokens * self.slot_bytes)
            for place, token in expected[rank].items():
                at = place * self.slot_bytes
                assert got[at : at + self.slot_bytes] == token, f"seed {seed}: rank {rank} slot {place}"
        return report

    @property
    def slot_bytes(self) -> int:
        return self.config.token_bytes + 128

    def _prepare(
        self, chance: random.Random, timeout_ns: int
    ) -> tuple[list[Launch], list[dict[int, bytes]], list[int], list[int]]:
        c, recv_bytes = self.config, NUM_RANKS * self.config.num_tokens * self.slot_bytes
        recv = [self._allocate(bytes([0xEE]) * recv_bytes, f"recv of rank {rank}") for rank in range(NUM_RANKS)]
        arrived = [self._allocate(bytes(4), f"arrived of rank {rank}") for rank in range(NUM_RANKS)]
        expected: list[dict[int, bytes]] = [{} for _ in range(NUM_RANKS)]
        launches, outputs, faults = [], [], []
        for rank in range(NUM_RANKS):
            x = chance.randbytes(c.num_tokens * c.token_bytes)
            target = np.array([chance.randrange(NUM_RANKS) for _ in range(c.num_tokens)], np.int32)
            slot = np.array([np.sum(target[:t] == target[t]) for t in range(c.num_tokens)], np.int32)
            for token in range(c.num_tokens):
                meta = np.full(32, rank * c.num_tokens + token, np.int32).tobytes()
                row = x[token * c.token_bytes : (token + 1) * c.token_bytes] + meta
                expected[target[token]][rank * c.num_tokens + int(slot[token])] = row
            outputs.append(self._allocate(bytes(recv_bytes), f"y of rank {rank}"))
            faults.append(self._allocate(bytes(40), f"fault of rank {rank}"))
            args = ExchangeArgs(
                self._allocate(x, f"x of rank {rank}"),
                self._allocate(target.tobytes(), f"target of rank {rank}"),
                self._allocate(slot.tobytes(), f"slot of rank {rank}"),
                (ctypes.c_void_p * NUM_RANKS)(*recv),
                (ctypes.c_void_p * NUM_RANKS)(*arrived),
                outputs[-1],
                faults[-1],
                timeout_ns,
                rank,
                self.epoch,
            )
            launches.append(Launch(self.artifact, "exchange", bytes(args), rank, NUM_BLOCKS, NUM_THREADS, 2048))
        return launches, expected, outputs, faults

    def _allocate(self, data: bytes, name: str) -> int:
        address = self.world.allocate(len(data), name=name)
        self.world.write(address, data)
        self._regions.append(address)
        return address

    def _free(self) -> None:
        for address in self._regions if self.world.is_alive else ():
            self.world.free(address)
        self._regions.clear()
