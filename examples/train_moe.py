"""Trains a small mixture-of-experts language model over several ranks, and again on one without any communication.

    python examples/train_moe.py                                        4 ranks, started by this program
    python examples/train_moe.py --ranks 2 --save moe.pt                then examples/decode.py --model moe.pt
    torchrun --standalone --nproc-per-node 8 examples/train_moe.py --hidden 512 --experts 64 --sequences 128 --steps 200

Runs on GPUs if there is one for every rank, else on simulated ranks, in about a minute. It needs rich and matplotlib
(`pip install '.[examples]'`), or --plain, which leaves out the progress bar and the plot. The text is this project's
own pages, byte by byte. Every rank has its share of the sequences, a copy of what is dense and its own experts: tokens
go there and back by deep_ep.autograd, and so do their gradients; those of the copies are added up. Expected output,
apart from the last digits and from what becomes of the pages:

    step    1: loss 5.688
    step   21: loss 3.689
    step   41: loss 3.058
    step   61: loss 2.994
    step   81: loss 2.969
    step  100: loss 3.070
    4 ranks, simulated machine: largest difference from one rank's losses 0.0024, OK

The plot, loss.png, shows both curves and what lies between them. They must agree within 1/512 (bfloat16, in which
tokens travel, rounds to one part in so many) of ln 256, the loss of who knows nothing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from launch import launch, machine_of, num_ranks_of
from moe_model import NUM_BYTES, ByteModel, Config, Experts, RunPair, dense, normal, read_text
from torch import Tensor
from torch.nn.functional import cross_entropy

from deep_ep import ElasticBuffer, autograd, topk_idx_t

TOLERANCE = math.log(NUM_BYTES) / 512  # of a step's loss, in nats
# What is learned too fast amplifies what rounds a little otherwise: a wide model takes smaller steps, and they shrink.
LEARNING_RATE = 2e-3  # at a hidden size of 64, in the first step

Report = Callable[[int, float], None]  # told of each step and its loss


def expert_parallel(buffer: ElasticBuffer, num_experts: int) -> RunPair:
    """How to run a pair of expert layers whose experts live on all ranks: this is all that is not as on one rank."""

    def run_pair(pair: Sequence[Experts], x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        first, second = pair
        recv_x, _, weights, handle = autograd.dispatch(
            buffer, normal(x).bfloat16(), topk_idx.to(topk_idx_t), topk_weights, num_experts=num_experts, do_expand=True
        )
        counts = handle.num_recv_tokens_per_expert_list
        y = first.on_groups(recv_x, counts) * weights[:, None]
        x = x + autograd.combine(buffer, y.bfloat16(), handle)[0]
        # The same routes again: nothing is counted, the host waits for nothing, and the weights are here already.
        recv_x, *_ = autograd.dispatch(buffer, normal(x).bfloat16(), handle=handle, do_expand=True)
        y = second.on_groups(recv_x, counts) * weights[:, None]
        return x + autograd.combine(buffer, y.bfloat16(), handle)[0]

    return run_pair


def train(
    model: ByteModel,
    run_pair: RunPair,
    text: Tensor,
    share: slice,
    add_up: Callable[[ByteModel, Tensor], float],
    report: Report,
    options: argparse.Namespace,
) -> list[float]:
    """Train on a share of each step's sequences; returns the losses over all of them.

    Args:
        add_up: adds what other shares make of the step's loss and of the shared gradients; returns the whole loss.
    """
    chance = torch.Generator().manual_seed(options.seed)  # all shares see the same draws
    optimizer = torch.optim.AdamW(model.parameters())
    losses = []
    for step in range(options.steps):
        starts = torch.randint(len(text) - options.context, (options.sequences, 1), generator=chance)
        batch = text[(starts + torch.arange(options.context + 1)).to(text.device)][share].long()
        logits = model(batch[:, :-1], run_pair)
        loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
        loss = loss / (options.sequences * options.context)  # so that shares, and their gradients, add up to the mean
        optimizer.zero_grad()
        loss.backward()
        losses.append(add_up(model, loss.detach()))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 64 / options.hidden * (1 - step / options.steps)
        optimizer.step()
        report(step, losses[-1])
    return losses


def add_up_over_ranks(model: ByteModel, loss: Tensor) -> float:
    """Gradients of experts are whole as they are: all ranks' tokens have been there."""
    gradients = [parameter.grad for parameter in model.shared()]
    everything = torch.cat([loss.flatten(), *(gradient.flatten() for gradient in gradients)])
    dist.all_reduce(everything)
    whole_loss, *sums = everything.split([1, *(gradient.numel() for gradient in gradients)])
    for gradient, added in zip(gradients, sums, strict=True):
        gradient.copy_(added.view_as(gradient))
    return whole_loss.item()


def train_over_ranks(text: Tensor, report: Report, options: argparse.Namespace) -> list[float]:
    """This rank's part; rank 0 saves the model if it is asked to."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    model = ByteModel(config_of(options), options.seed).of_rank(rank, num_ranks).to(text.device)
    most = -(-options.sequences // num_ranks)  # the first ranks have so many, the last perhaps none
    buffer = ElasticBuffer(
        dist.group.WORLD,
        num_max_tokens_per_rank=most * options.context,
        hidden=options.hidden,
        num_topk=options.topk,
    )
    run_pair = expert_parallel(buffer, options.experts)
    share = slice(rank * most, (rank + 1) * most)
    losses = train(model, run_pair, text, share, add_up_over_ranks, report, options)
    buffer.destroy()
    if options.save:
        save(model, options.save)
    return losses


def save(model: ByteModel, path: Path) -> None:
    """Collect all experts on every rank, and let rank 0 write."""
    whole = ByteModel(model.config)
    weights = model.state_dict()
    for name, value in weights.items():
        if value.shape != whole.state_dict()[name].shape:
            parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, value.contiguous())
            weights[name] = torch.cat(parts)
    whole.load_state_dict(weights)
    if dist.get_rank() == 0:
        whole.save(path)


def config_of(options: argparse.Namespace) -> Config:
    return Config(options.hidden, options.experts, options.topk, options.context)


@contextmanager
def progress(title: str, options: argparse.Namespace) -> Iterator[Report]:
    """A bar on the terminal, or nothing."""
    if options.plain or (dist.is_initialized() and dist.get_rank() != 0):
        yield lambda step, loss: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=options.steps, loss=math.nan)
        yield lambda step, loss: bar.update(task, completed=step + 1, loss=loss)


def plot(path: Path, over_ranks: list[float], alone: list[float], title: str) -> None:
    """Both curves, and below them how far they are apart."""
    from matplotlib.figure import Figure

    steps = range(1, len(alone) + 1)
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    above.plot(steps, over_ranks, color="#f2a65a", linewidth=5, solid_capstyle="round", label=title)
    above.plot(steps, alone, color="#1d3557", linewidth=1.2, label="one rank, no communication")
    above.set_ylabel("loss, nats a byte")
    above.legend(frameon=False)
    below.plot(steps, [mine - one for mine, one in zip(over_ranks, alone, strict=True)], color="#1d3557", linewidth=1.2)
    below.axhspan(-TOLERANCE, TOLERANCE, color="#f2a65a", alpha=0.2, linewidth=0)
    below.set_ylabel("difference")
    below.set_xlabel("step")
    figure.align_ylabels()
    for axes in (above, below):
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def run_rank(device: torch.device, options: argparse.Namespace) -> int:
    """Train over all ranks, then on the first alone, and compare."""
    num_ranks = dist.get_world_size()
    text = read_text(options.file).to(device)
    title = f"{num_ranks} ranks, {machine_of(device)}"
    with progress(f"{num_ranks} ranks", options) as report:
        over_ranks = train_over_ranks(text, report, options)
    if dist.get_rank() != 0:
        return 0
    for step in sorted({*range(0, options.steps, max(options.steps // 5, 1)), options.steps - 1}):
        print(f"step {step + 1:4}: loss {over_ranks[step]:.3f}")
    with progress("one rank, to compare", options) as report:
        model = ByteModel(config_of(options), options.seed).to(device)
        alone = train(model, dense, text, slice(None), lambda _, loss: loss.item(), report, options)
    if not options.plain:
        plot(options.plot, over_ranks, alone, title)
    difference = max(abs(mine - one) for mine, one in zip(over_ranks, alone, strict=True))
    passed = difference <= TOLERANCE  # and not if it is NaN
    verdict = "OK" if passed else f"FAILED: more than {TOLERANCE:.4f}"
    print(f"{title}: largest difference from one rank's losses {difference:.4f}, {verdict}", flush=True)
    return 0 if passed else 1


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains a small mixture-of-experts language model over several ranks.")
    parser.add_argument("--file", type=Path, nargs="*", default=[], help="whose bytes are learned; the project's pages")
    parser.add_argument("--ranks", type=int, default=4, help="ranks to start (under torchrun: its own)")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--sequences", type=int, default=4, help="of a step, all ranks together")
    parser.add_argument("--context", type=int, default=64, help="bytes of a sequence")
    parser.add_argument("--hidden", type=int, default=64, help="a multiple of 8")
    parser.add_argument("--experts", type=int, default=8, help="of a layer; a multiple of the number of ranks")
    parser.add_argument("--topk", type=int, default=2, help="experts that each token chooses")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("loss.png"), help="where the curves are drawn")
    parser.add_argument("--save", type=Path, help="where the trained model is put")
    parser.add_argument("--plain", action="store_true", help="neither a progress bar nor a plot")
    options = parser.parse_args()
    options.ranks = num_ranks_of(options)
    for name in ("ranks", "steps", "sequences", "context", "hidden", "experts"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, but it is {getattr(options, name)}")
    if options.hidden % 8:
        parser.error(f"--hidden {options.hidden} is not a multiple of 8 (a row must be a multiple of 16 bytes)")
    if options.experts % options.ranks:
        parser.error(f"--experts {options.experts} is not a multiple of the {options.ranks} ranks")
    if not 1 <= options.topk <= options.experts:
        parser.error(f"--topk {options.topk} is not between 1 and the {options.experts} experts")
    for file in options.file:
        if not file.is_file():
            parser.error(f"--file {file} is not a file")
    num_bytes = len(read_text(options.file))
    if num_bytes <= options.context:
        parser.error(f"--file has {num_bytes} bytes, not more than the --context of {options.context}")
    missing = [name for name in ("rich", "matplotlib") if not options.plain and find_spec(name) is None]
    if missing:
        parser.error(f"{' and '.join(missing)} cannot be imported: pip install '.[examples]', or use --plain")
    return options


if __name__ == "__main__":
    launch(run_rank, parse_options())
