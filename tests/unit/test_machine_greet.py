"""One kernel through the whole machine: windows, tensors, host words, waiting for peers; here on simulated ranks.

On GPUs:  torchrun --nproc-per-node 2 tests/unit/test_machine_greet.py
"""

from __future__ import annotations

import ctypes
import datetime
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from deep_ep import jit
from deep_ep.environment import Environment, read
from deep_ep.machine import Machine, open_machine
from deep_ep.machine.meeting import Limits

ROOT = Path(__file__).resolve().parents[2]
MAX_RANKS = 16
ROW_BYTES = 4 * MAX_RANKS  # of one round in the window: a word a rank
PATIENCE = datetime.timedelta(seconds=120)

HEADER = """
#pragma once
#include <deep_ep/device/device.cuh>

namespace deep_ep {

struct GreetConfig {
  int max_ranks;
};

struct GreetArgs {
  std::uint32_t* window[16];
  device::FaultRecord* fault;
  const std::uint32_t* x;
  std::uint32_t* y;
  std::uint32_t rank, num_ranks, round, secret;
};

// Thread p greets rank p, waits for its greeting, and adds it to x[p].
template <GreetConfig C>
EP_DEVICE void greet(const GreetArgs& args) {
  const std::uint32_t peer = device::thread_idx();
  if (peer >= args.num_ranks) return;
  const std::uint32_t row = args.round * C.max_ranks;
  device::store_release_sys(args.window[peer] + row + args.rank, args.secret + args.rank);
  const std::uint32_t* mine = args.window[args.rank] + row + peer;
  const device::Waiting waiting{1, static_cast<std::int32_t>(peer), args.secret + peer};
  const device::Patience patience{args.fault, 20'000'000'000};
  if (!device::wait_until_equals(patience, waiting, [&] { return device::load_acquire_sys(mine); })) return;
  args.y[peer] = args.x[peer] + waiting.expected;
}

}  // namespace deep_ep
"""


class GreetArgs(ctypes.Structure):
    _fields_ = (
        ("window", ctypes.c_void_p * MAX_RANKS),
        ("fault", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("rank", ctypes.c_uint32),
        ("num_ranks", ctypes.c_uint32),
        ("round", ctypes.c_uint32),
        ("secret", ctypes.c_uint32),
    )


@dataclass(frozen=True)
class GreetConfig:
    max_ranks: int = MAX_RANKS


def greet_kernel(folder: Path) -> jit.Kernel:
    header = folder / "greet.cuh"
    header.write_text(HEADER)
    return jit.Kernel("greet", GreetConfig(), GreetArgs, num_threads=32, header=str(header))


def greet(machine: Machine, kernel: jit.Kernel, num_rounds: int, stream: Any = None) -> None:
    """Greet in several rounds through one window; AssertionError if any rank heard anything else than it should."""
    window = machine.allocate_window(ROW_BYTES * num_rounds)
    words = machine.host_words(10)  # a fault record
    machine.prepare([kernel])
    x = torch.arange(machine.num_ranks, dtype=torch.int32, device=machine.device) * 1000
    y = torch.zeros_like(x)
    args = GreetArgs(
        fault=words.address, x=x.data_ptr(), y=y.data_ptr(), rank=machine.rank, num_ranks=machine.num_ranks
    )
    for rank, address in enumerate(window.addresses):
        args.window[rank] = address
    for round_idx in range(num_rounds):
        args.round, args.secret = round_idx, 7 * round_idx
        machine.launch(
            kernel,
            args,
            num_blocks=1,
            shared_bytes=0,
            stream=stream,
            reads=[x],
            writes=[y],
        )
        if stream is not None:
            stream.synchronize()
        expected = [1001 * peer + args.secret for peer in range(machine.num_ranks)]
        assert y.tolist() == expected, (round_idx, y.tolist(), expected, words.tensor.tolist())
    assert words.tensor.tolist() == [0] * 10
    machine.meet("to end")
    window.close()
    words.close()


def greet_in_a_rank(rank: int, num_ranks: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), num_ranks)
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks, store=store, timeout=PATIENCE)
    assert dist.group.WORLD is not None
    machine = open_machine(dist.group.WORLD, Environment(), Limits())
    greet(machine, greet_kernel(folder), num_rounds=3)
    machine.close()
    dist.destroy_process_group()


def test_one_rank_alone_greets_itself(tmp_path: Path) -> None:
    greet_in_a_rank(0, 1, tmp_path)


def test_simulated_ranks_greet_each_other(tmp_path: Path) -> None:
    multiprocessing.spawn(greet_in_a_rank, (4, tmp_path), nprocs=4)


def test_a_killed_rank_leaves_no_world_behind(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib, torch.distributed as dist\n"
        "from deep_ep.environment import Environment\n"
        "from deep_ep.machine import open_machine\n"
        "from deep_ep.machine.meeting import Limits\n"
        "store = dist.FileStore(sys.argv[1], 1)\n"
        "dist.init_process_group('gloo', rank=0, world_size=1, store=store)\n"
        "machine = open_machine(dist.group.WORLD, Environment(), Limits())\n"
        "print(machine._service.world._process.pid, flush=True)\n"
        "time.sleep(100)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "store")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as rank:
        assert rank.stdout is not None
        world = Path("/proc") / rank.stdout.readline().strip()
        assert world.name.isdigit()
        assert world.exists()
        rank.kill()
    deadline = time.monotonic() + 20
    while is_running(world) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(world)


def is_running(process: Path) -> bool:
    try:
        return ") Z " not in (process / "stat").read_text()  # a zombie waits for whoever adopted it
    except (FileNotFoundError, ProcessLookupError):
        return False


def main() -> None:
    """Every way of opening and closing a machine on GPUs; writes one line a rank and step."""
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    kernel = greet_kernel(Path(tempfile.mkdtemp()))
    store, *_ = next(dist.rendezvous("env://"))
    for step, (backend, settings, eager) in enumerate(
        [
            ("nccl", {}, False),
            ("cpu:gloo,cuda:nccl", {}, True),
            ("nccl", {"EP_REUSE_NCCL_COMM": "0"}, False),
        ]
    ):
        start_s = time.monotonic()
        own = dist.PrefixStore(f"step {step}", store)  # NCCL's identifiers of the groups before stay in the store
        dist.init_process_group(
            backend, store=own, rank=rank, world_size=num_ranks, device_id=device if eager else None
        )
        assert dist.group.WORLD is not None
        machine = open_machine(dist.group.WORLD, read({**os.environ, **settings}), Limits())
        greet(machine, kernel, num_rounds=20, stream=machine.comm_stream)
        greet(machine, kernel, num_rounds=20, stream=torch.cuda.current_stream())
        microseconds = time_launches(machine, kernel)
        forgotten = machine.allocate_window(1 << 20)
        if step == 1:  # the wrong order: the group takes its communicator away first
            dist.destroy_process_group()
            forgotten.close()
            machine.close()
        else:
            machine.close()
            dist.destroy_process_group()
        took = f"{time.monotonic() - start_s:.1f} s, {microseconds:.1f} us a launch"
        line = f"rank {rank} of {num_ranks}, {backend} {settings}: OK, {took}\n"
        sys.stdout.write(line)
        sys.stdout.flush()


def time_launches(machine: Machine, kernel: jit.Kernel) -> float:
    """Microseconds that the host spends on a launch (of a kernel that returns at once: it has no ranks to greet)."""
    args, stream = GreetArgs(), torch.cuda.current_stream()
    for count in (100, 1000):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            machine.launch(kernel, args, num_blocks=1, shared_bytes=0, stream=stream, reads=[], writes=[])
        seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds / count * 1e6


if __name__ == "__main__":
    sys.exit(main())
