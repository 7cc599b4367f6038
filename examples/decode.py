"""Continues texts byte by byte with the model of train_moe.py, over several ranks, and compares with one rank's logits.

    python examples/decode.py                                           4 ranks; a model that has learned nothing
    python examples/decode.py --ranks 2 --model moe.pt                  what train_moe.py --save moe.pt has left
    torchrun --standalone --nproc-per-node 8 examples/decode.py         the ranks that torchrun started

Every rank continues some texts of its own, with the help of all ranks' experts. A step is the same work whatever the
bytes are: `do_cpu_sync=False` gives tensors of the largest size that could be needed, so the host waits for nothing.
The layers of a pair share their router: the second dispatches by the handle of the first, so nothing is counted and no
route travels again. On GPUs (one for every rank) a step is captured in a CUDA graph and replayed for each byte;
simulated ranks make the same calls one by one. Expected output without a GPU, apart from the speed
(and with a model, before it, the texts: what was given -> what was written):

    63 steps made call by call: 120 bytes a second
    4 ranks, simulated machine: 383 of 384 bytes are those that one rank chooses
    4 ranks, simulated machine: largest difference from one rank's logits 0.0018 of the largest, OK

One rank then reads all texts at once, without cache or communication, in float32. A layer rounds three times to
bfloat16 (rows, each rank's part, their sum), each time by 1/512 at most, and there are two layers in a pair: so logits
may differ by 6/512 of the largest.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from launch import launch, machine_of, num_ranks_of
from moe_model import NUM_BYTES, ByteModel, Cache, Config, Experts, dense, normal, read_text
from torch import Tensor

from deep_ep import ElasticBuffer, topk_idx_t

PROMPT = 16  # bytes that each text starts with
TOLERANCE = 6 / 512  # of the largest logit


@dataclass(frozen=True)
class Record:
    """What has been decoded, position by position, in memory that never moves, as a CUDA graph needs it."""

    text: Tensor  # [texts, context] int64
    logits: Tensor  # [texts, context, 256]: of the byte that follows
    topk_idx: Tensor  # [texts, blocks, context, K] int64: what the routers chose
    topk_weights: Tensor  # [texts, blocks, context, K]

    @staticmethod
    def empty(config: Config, num_texts: int, device: torch.device) -> Record:
        choices = (num_texts, config.blocks, config.context, config.topk)
        return Record(
            text=torch.zeros(num_texts, config.context, dtype=torch.int64, device=device),
            logits=torch.zeros(num_texts, config.context, NUM_BYTES, device=device),
            topk_idx=torch.zeros(choices, dtype=torch.int64, device=device),
            topk_weights=torch.zeros(choices, device=device),
        )

    def gather(self) -> Record:
        """All ranks' texts, one rank's behind the other's."""
        everyone: list[dict[str, Tensor]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, {name: value.cpu() for name, value in vars(self).items()})
        parts = {name: [rank[name] for rank in everyone] for name in everyone[0]}
        return Record(**{name: torch.cat(values) for name, values in parts.items()})


class Decoder:
    """This rank's texts, and a step that reads a byte of each and writes the next."""

    def __init__(self, model: ByteModel, buffer: ElasticBuffer, prompts: Tensor) -> None:
        self.model, self.buffer, self.prompts = model, buffer, prompts
        self.position = torch.zeros(1, dtype=torch.int64, device=prompts.device)
        self.caches = [Cache.empty(model.config, len(prompts), self.position) for _ in model.blocks]
        self.record = Record.empty(model.config, len(prompts), prompts.device)
        self.choices: list[tuple[Tensor, Tensor]] = []  # of this step, by block
        self.start()

    def start(self) -> None:
        """Back to the prompts. What the caches hold may stay: attention looks at no position that is yet to come."""
        self.position.zero_()
        self.record.text[:, :PROMPT] = self.prompts

    def step(self) -> None:
        text, here, following = self.record.text, self.position, self.position + 1
        self.choices.clear()
        logits = self.model(text.index_select(1, here), self.run_pair, self.caches)
        self.record.logits.index_copy_(1, here, logits)
        for record, chosen in zip(
            (self.record.topk_idx, self.record.topk_weights), zip(*self.choices, strict=True), strict=True
        ):
            record.index_copy_(2, here, torch.stack(chosen, dim=1).unsqueeze(2))
        in_prompt = following < PROMPT  # then the byte is there already
        text.index_copy_(1, following, torch.where(in_prompt, text.index_select(1, following), logits.argmax(dim=-1)))
        here.copy_(following)

    def run_pair(self, pair: Sequence[Experts], x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        """Two layers of experts on one byte of every text."""
        first, second = pair
        self.choices.append((topk_idx, topk_weights))
        recv_x, recv_idx, recv_weights, handle, _ = self.buffer.dispatch(
            normal(x).bfloat16(),
            topk_idx.to(topk_idx_t),
            topk_weights,
            num_experts=self.model.config.experts,
            do_cpu_sync=False,
        )
        y = first.on_all(recv_x, recv_idx, recv_weights).bfloat16()
        x = x + self.buffer.combine(y, handle)[0]
        # Other rows to the same places: what stands beside them, experts and weights, is here already.
        recv_x, *_ = self.buffer.dispatch(normal(x).bfloat16(), handle=handle)
        y = second.on_all(recv_x, recv_idx, recv_weights).bfloat16()
        return x + self.buffer.combine(y, handle)[0]


def warmed_up(decoder: Decoder, as_graph: bool) -> Callable[[], None]:
    """The decoder's step, or a CUDA graph of it, after some that are not counted: they load kernels and libraries.

    All ranks capture, and replay, alike. A replay is a call of the buffer on the current stream.
    """
    if not as_graph:
        decoder.step()
        decoder.start()
        return decoder.step
    beside = torch.cuda.Stream()  # capture must not be the first that runs on a stream other than the default
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            decoder.step()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's own thread looks at its events meanwhile
        decoder.step()
    decoder.start()
    return graph.replay


@torch.no_grad()
def run_rank(device: torch.device, options: argparse.Namespace) -> int:
    """Decode; then let the first rank compare all ranks' logits with its own."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    model = whole_model(options).of_rank(rank, num_ranks).to(device)
    config = model.config
    buffer = ElasticBuffer(
        dist.group.WORLD,
        num_max_tokens_per_rank=options.texts,
        hidden=config.hidden,
        num_topk=config.topk,
    )
    decoder = Decoder(model, buffer, prompts(options)[rank * options.texts : (rank + 1) * options.texts].to(device))
    on_gpu = device.type == "cuda"
    as_graph = on_gpu and not options.eager
    step = warmed_up(decoder, as_graph)
    buffer.barrier(with_cpu_sync=True)
    began = time.perf_counter()
    for _ in range(config.context - 1):
        step()
    buffer.barrier(with_cpu_sync=True)
    seconds = time.perf_counter() - began
    buffer.destroy()
    record = decoder.record.gather()
    if rank != 0:
        return 0

    for number, text in enumerate(record.text.tolist() if options.model else []):  # untrained, it writes noise
        prompt, written = (bytes(part).decode(errors="replace") for part in (text[:PROMPT], text[PROMPT:]))
        print(f"rank {number // options.texts}: {prompt!r} -> {written!r}")
    steps = "replays of a CUDA graph" if as_graph else "steps made call by call"
    speed = len(record.text) * (config.context - 1) / seconds
    print(f"{config.context - 1} {steps}: {speed:.0f} bytes a second")
    return compare(record, f"{num_ranks} ranks, {machine_of(device)}", whole_model(options).to(device), device)


def compare(record: Record, title: str, model: ByteModel, device: torch.device) -> int:
    """Read all texts on one rank; returns the exit code."""
    last = model.config.context - 1  # nothing follows it
    text, logits = record.text.to(device), record.logits[:, :last].to(device)
    choices = zip(record.topk_idx.to(device).unbind(1), record.topk_weights.to(device).unbind(1), strict=True)

    def as_chosen(pair: Sequence[Experts], x: Tensor, *own_choices: Tensor) -> Tensor:
        """By the ranks' choices: two experts may be so close that rounding decides between them."""
        return dense(pair, x, *(kept[:, :last].flatten(0, 1) for kept in next(choices)))

    expected = model(text[:, :last], as_chosen)
    same = expected[:, PROMPT - 1 :].argmax(dim=-1) == text[:, PROMPT:]
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    passed = difference <= TOLERANCE  # and not if it is NaN
    verdict = "OK" if passed else f"FAILED: more than {TOLERANCE:.4f}"
    print(f"{title}: {int(same.sum())} of {same.numel()} bytes are those that one rank chooses")
    print(f"{title}: largest difference from one rank's logits {difference:.4f} of the largest, {verdict}", flush=True)
    return 0 if passed else 1


def whole_model(options: argparse.Namespace) -> ByteModel:
    return ByteModel.load(options.model) if options.model else ByteModel(Config(64, experts=8, topk=2, context=64))


def prompts(options: argparse.Namespace) -> Tensor:
    """The beginnings of all ranks' texts, [texts, PROMPT]: pieces of the pages that train_moe.py learns."""
    pages = read_text([])
    starts = torch.arange(options.ranks * options.texts) * (len(pages) // (options.ranks * options.texts))
    return pages[starts[:, None] + torch.arange(PROMPT)].long()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Continues texts byte by byte over several ranks.")
    parser.add_argument("--model", type=Path, help="what train_moe.py --save has left; otherwise an untrained one")
    parser.add_argument("--ranks", type=int, default=4, help="ranks to start (under torchrun: its own)")
    parser.add_argument("--texts", type=int, default=2, help="of each rank")
    parser.add_argument("--eager", action="store_true", help="no CUDA graph on GPUs either")
    options = parser.parse_args()
    options.ranks = num_ranks_of(options)
    for name in ("ranks", "texts"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, but it is {getattr(options, name)}")
    if options.model and not options.model.is_file():
        parser.error(f"--model {options.model} is not a file; train_moe.py --save {options.model} makes it")
    try:
        config = whole_model(options).config
    except ValueError as error:
        parser.error(f"--model {error}; make one with train_moe.py --save moe.pt")
    if config.experts % options.ranks:
        parser.error(f"--ranks {options.ranks} does not divide the model's {config.experts} experts")
    if config.context <= PROMPT:
        parser.error(f"--model {options.model} sees {config.context} bytes, not more than the {PROMPT} of a prompt")
    return options


if __name__ == "__main__":
    launch(run_rank, parse_options())
