"""Several ranks for a test: how a test starts them, and how each of them joins its group."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
MACHINES = ("cuda", "simulated")


@dataclass(frozen=True)
class Done:
    """How a job of several ranks ended."""

    command: str
    returncode: int
    output: str

    def check(self) -> str:
        """The output of a job that went well; a failure shows all of it, and how to run the job again."""
        assert self.returncode == 0, f"{self.output}\nexit code {self.returncode}\nthe whole job again: {self.command}"
        return self.output


def torchrun(num_ranks: int, module: str, *options: str, timeout_s: float = 240, **variables: str) -> Done:
    """Run ``python -m module`` on so many ranks of this host.

    Args:
        variables: changes of the environment. No GPU is visible unless CUDA_VISIBLE_DEVICES is among them.
    """
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks))
    command = [sys.executable, *launcher, "-m", module, *options]
    changes = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **variables}
    written = " ".join([*(f"{name}={shlex.quote(value)}" for name, value in changes.items()), *command])
    # A session of its own, so that after a timeout no rank is left behind.
    job = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **changes},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = job.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        output, _ = job.communicate()
        output += f"\nthe job did not end within {timeout_s} s"
    return Done(written, job.returncode, output)


def join(machine: str, splits: bool = True) -> tuple[dist.ProcessGroup, torch.device]:
    """Make this process a rank of the group that torchrun describes; returns the group and the device of its tensors.

    With more ranks than GPUs, several ranks share one.

    Args:
        splits: torch makes later groups by splitting NCCL's communicator, which takes all ranks of this one.
    """
    torch.set_num_threads(1)
    if machine == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device if splits else None)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    return group, device
