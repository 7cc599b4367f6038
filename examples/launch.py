"""How an example starts its ranks, or joins those of torchrun: on GPUs if there is one for each, else simulated."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Does one rank's part in an initialised process group, on that device; returns the exit code.
RunRank = Callable[[torch.device, argparse.Namespace], int]


def launch(run_rank: RunRank, options: argparse.Namespace) -> None:
    """Run it on ``options.ranks`` ranks; the program ends with the exit code of one that is not 0."""
    if "RANK" in os.environ:
        _join(int(os.environ["RANK"]), options.ranks, "env://", run_rank, options)
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting_place = f"file://{folder}/ranks"
        try:
            mp.spawn(_join, args=(options.ranks, meeting_place, run_rank, options), nprocs=options.ranks)
        except mp.ProcessExitedException as error:
            sys.exit(error.exit_code)


def num_ranks_of(options: argparse.Namespace) -> int:
    """``--ranks``, unless torchrun has decided."""
    return int(os.environ.get("WORLD_SIZE", options.ranks))


def machine_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "simulated machine"


def _join(rank: int, num_ranks: int, init_method: str, run_rank: RunRank, options: argparse.Namespace) -> None:
    """Enter the process group on a GPU if every rank has one, else as a simulated rank; run; leave."""
    if torch.cuda.device_count() >= num_ranks:
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", init_method, rank=rank, world_size=num_ranks, device_id=device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(1)  # the ranks share the processor
        dist.init_process_group("gloo", init_method, rank=rank, world_size=num_ranks)
    code = run_rank(device, options)
    dist.destroy_process_group()
    if code:
        sys.exit(code)
