"""A mixture-of-experts layer over several ranks, compared bit for bit with the same layer on one rank.

    python examples/moe_layer.py                                        4 ranks, started by this program
    python examples/moe_layer.py --ranks 2 --file README.md             any file of bytes, any number of ranks
    torchrun --standalone --nproc-per-node 2 examples/moe_layer.py      the ranks that torchrun started

Runs on GPUs (H100 or newer, one NVLink domain) if there is one for every rank, else on simulated ranks. Each byte of
the file is a token. A gate chooses the top-k experts of every token; dispatch takes it to the ranks where they live;
they run; combine brings the weighted sums back. Expected output of a run with the defaults and no GPU (the gate's
rounding, and so a count, may be a little different on another processor):

    rank 0: 1024 tokens; sent to each rank 725, 556, 643, 789; received 2839; each expert got 875, 785, 1007, 976
    rank 1: 1024 tokens; sent to each rank 703, 565, 641, 786; received 2219; each expert got 940, 702, 206, 939
    rank 2: 1024 tokens; sent to each rank 704, 538, 655, 778; received 2617; each expert got 647, 467, 653, 1210
    rank 3: 1024 tokens; sent to each rank 707, 560, 678, 775; received 3128; each expert got 1262, 215, 1568, 716
    4 ranks, 4096 tokens, simulated machine: largest difference 0.0, OK

The difference is 0.0, not merely small: tokens arrive in the order of (rank, token), so that each expert sees the very
matrix that it would see on one rank, and combine adds in an order that is part of its contract.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from launch import launch, machine_of, num_ranks_of
from torch import Tensor
from torch.nn.functional import silu

from deep_ep import ElasticBuffer, EPHandle, topk_idx_t

TEXT = Path(__file__).parent / "text" / "a_day_at_the_sorting_office.txt"
MIN_PROBABILITY = 0.05  # a choice that the gate likes less than this is dropped: its index becomes -1


@dataclass(frozen=True)
class Layer:
    """The weights, the same on every rank, though a rank runs only its own experts: rank r has those from r * L on."""

    embedding: Tensor  # [256, hidden] bfloat16, a row for each byte
    position: Tensor  # [tokens, hidden] bfloat16: no two tokens are alike, so that one in another's place shows
    gate: Tensor  # [hidden, experts] bfloat16
    up: Tensor  # [experts, hidden, 2 * hidden] bfloat16
    down: Tensor  # [experts, 2 * hidden, hidden] bfloat16

    @staticmethod
    def random(num_tokens: int, hidden: int, num_experts: int, device: torch.device) -> Layer:
        generator = torch.Generator().manual_seed(0)  # drawn on the CPU, so that every machine draws the same

        def draw(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator) * shape[-2] ** -0.5
            return values.bfloat16().to(device)

        return Layer(
            embedding=draw(256, hidden) * 16,
            position=draw(num_tokens, hidden) * num_tokens**0.5 / 4,
            gate=draw(hidden, num_experts) * 2,
            up=draw(num_experts, hidden, 2 * hidden),
            down=draw(num_experts, 2 * hidden, hidden),
        )

    def embed(self, text: Tensor) -> Tensor:
        return self.embedding[text.int()] + self.position

    def route(self, x: Tensor, num_topk: int) -> tuple[Tensor, Tensor]:
        """Choose experts: topk_idx [tokens, num_topk] topk_idx_t and topk_weights [tokens, num_topk] float32."""
        probabilities = (x @ self.gate).float().softmax(dim=-1)
        topk_weights, topk_idx = probabilities.topk(num_topk)
        return topk_idx.masked_fill(topk_weights < MIN_PROBABILITY, -1).to(topk_idx_t), topk_weights

    def run_experts(self, experts: range, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        """Sum over some of the experts: each one's MLP on the tokens that chose it, times the gate's weight.

        Args:
            experts: which of the layer's experts; entry i of topk_idx means experts[i], and -1 means none.
            x: [tokens, hidden] bfloat16.
        Returns:
            [tokens, hidden] bfloat16, rounded once from a sum in float32.
        """
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for idx, expert in enumerate(experts):
            rows, selection = (topk_idx == idx).nonzero(as_tuple=True)
            y = silu(x[rows] @ self.up[expert]) @ self.down[expert]
            total.index_add_(0, rows, y.float() * topk_weights[rows, selection, None])
        return total.bfloat16()


def expert_parallel(
    buffer: ElasticBuffer, layer: Layer, x: Tensor, topk_idx: Tensor, topk_weights: Tensor
) -> tuple[Tensor, EPHandle]:
    """The layer on this rank's tokens, with the help of all ranks: this is all that a model has to do."""
    num_experts = layer.gate.shape[1]
    num_local = num_experts // buffer.num_ranks
    recv_x, recv_topk_idx, recv_topk_weights, handle, _ = buffer.dispatch(
        x, topk_idx, topk_weights, num_experts=num_experts, do_cpu_sync=True
    )
    experts = range(buffer.rank_idx * num_local, (buffer.rank_idx + 1) * num_local)
    y = layer.run_experts(experts, recv_x, recv_topk_idx, recv_topk_weights)
    combined, _, _ = buffer.combine(y, handle)
    return combined, handle


def dense(layer: Layer, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, num_ranks: int) -> Tensor:
    """The layer on all tokens without any communication, with the roundings that the contract of combine names."""
    num_local = layer.gate.shape[1] // num_ranks
    owner = topk_idx.div(num_local, rounding_mode="floor")  # the rank of each selection's expert; -1 stays -1
    partial = []
    for rank in range(num_ranks):
        experts = range(rank * num_local, (rank + 1) * num_local)
        local_idx = torch.where(owner == rank, topk_idx - experts.start, -1)
        partial.append(layer.run_experts(experts, x, local_idx, topk_weights))

    # Ranks are added in float32, in the order in which each one's last expert stands among the selections.
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for k in range(topk_idx.shape[1]):
        is_last = (owner[:, k:] == owner[:, k : k + 1]).sum(dim=1) == 1
        for rank in range(num_ranks):
            total += torch.where((is_last & (owner[:, k] == rank))[:, None], partial[rank].float(), 0.0)
    return total.bfloat16()


def describe(buffer: ElasticBuffer, topk_idx: Tensor, num_experts: int, handle: EPHandle) -> str:
    """Say what this rank sent and received."""
    owner = topk_idx.div(num_experts // buffer.num_ranks, rounding_mode="floor")
    sent = [int((owner == rank).any(dim=1).sum()) for rank in range(buffer.num_ranks)]
    got = handle.num_recv_tokens_per_expert_list
    return (
        f"rank {buffer.rank_idx}: {len(topk_idx)} tokens; sent to each rank {', '.join(map(str, sent))}; "
        f"received {handle.num_recv_tokens}; each expert got {', '.join(map(str, got))}"
    )


def run_rank(device: torch.device, options: argparse.Namespace) -> int:
    """Do one rank's part in an initialised process group; return the exit code."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    text = torch.frombuffer(bytearray(options.file.read_bytes()[: options.max_tokens]), dtype=torch.uint8).to(device)
    layer = Layer.random(len(text), options.hidden, options.experts, device)
    shares = layer.embed(text).tensor_split(num_ranks)  # the ranks hold about equally many tokens, in the file's order
    x = shares[rank].contiguous()
    topk_idx, topk_weights = layer.route(x, options.topk)

    buffer = ElasticBuffer(
        dist.group.WORLD,
        num_max_tokens_per_rank=len(shares[0]),  # the first share is the largest
        hidden=options.hidden,
        num_topk=options.topk,
    )
    combined, handle = expert_parallel(buffer, layer, x, topk_idx, topk_weights)
    report = describe(buffer, topk_idx, options.experts, handle)
    buffer.destroy()

    # The dense layer takes the gate's choices as the ranks made them: over more rows a product may round otherwise.
    mine = (report, topk_idx.cpu(), topk_weights.cpu(), combined.cpu())
    everyone: list[tuple[str, Tensor, Tensor, Tensor]] = [mine] * num_ranks
    dist.all_gather_object(everyone, mine)
    if rank != 0:
        return 0
    reports, *tensors = zip(*everyone, strict=True)
    all_topk_idx, all_topk_weights, result = (torch.cat(parts).to(device) for parts in tensors)
    expected = dense(layer, torch.cat(shares), all_topk_idx, all_topk_weights, num_ranks)
    difference = (result.double() - expected.double()).abs().max().item()

    print(*reports, sep="\n")
    verdict = "OK" if difference == 0.0 else "FAILED: the result must not differ in a single bit"
    print(
        f"{num_ranks} ranks, {len(text)} tokens, {machine_of(device)}: largest difference {difference}, {verdict}",
        flush=True,
    )
    return 0 if difference == 0.0 else 1


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A mixture-of-experts layer over several ranks.")
    parser.add_argument("--file", type=Path, default=TEXT, help="whose bytes are the tokens")
    parser.add_argument("--max-tokens", type=int, default=4096, help="how much of the file is read, in bytes")
    parser.add_argument("--ranks", type=int, default=4, help="ranks to start (under torchrun: its own)")
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 8")
    parser.add_argument("--experts", type=int, default=16, help="a multiple of the number of ranks")
    parser.add_argument("--topk", type=int, default=4, help="experts that each token chooses")
    options = parser.parse_args()
    options.ranks = num_ranks_of(options)
    for name in ("ranks", "max_tokens", "hidden", "experts"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, but it is {getattr(options, name)}")
    if options.hidden % 8:
        parser.error(f"--hidden {options.hidden} is not a multiple of 8 (a row must be a multiple of 16 bytes)")
    if options.experts % options.ranks:
        parser.error(f"--experts {options.experts} is not a multiple of the {options.ranks} ranks")
    if not 1 <= options.topk <= options.experts:
        parser.error(f"--topk {options.topk} is not between 1 and the {options.experts} experts")
    if not options.file.is_file() or options.file.stat().st_size == 0:
        parser.error(f"--file {options.file} is not a file with something in it")
    return options


if __name__ == "__main__":
    launch(run_rank, parse_options())
