"""A small language model of bytes with mixture-of-experts layers: what train_moe.py trains and decode.py runs.

A block is attention and a pair of expert layers that share their router. So the second layer's tokens go where the
first's went, and are dispatched by the first's handle. How a pair is run is an argument of the model: `dense` is one
way, of one rank that has all experts; the examples add theirs, over several ranks.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

ROOT = Path(__file__).resolve().parents[1]
NUM_BYTES = 256


@dataclass(frozen=True)
class Config:
    hidden: int  # a multiple of 8, and of heads
    experts: int
    topk: int
    context: int  # bytes that the model sees
    blocks: int = 1
    heads: int = 4


class Experts(nn.Module):
    """Some experts of one layer: all of them, or those of one rank."""

    def __init__(self, num_experts: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(num_experts, hidden, 2 * hidden) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(num_experts, 2 * hidden, hidden) * (2 * hidden) ** -0.5)

    def on_all(self, rows: Tensor, idx: Tensor, weights: Tensor) -> Tensor:
        """Each expert on every row, times the weight that the row has for it, or zero; and their sum.

        More work than need be, but no shape depends on the routes: a CUDA graph can hold it.

        Args:
            rows: [N, hidden].
            idx: [N, K], which of these experts; anything else counts as none.
            weights: [N, K].
        Returns:
            [N, hidden] float32.
        """
        numbers = torch.arange(len(self.up), device=idx.device)[:, None, None]
        share = (weights * (idx == numbers)).sum(dim=2)  # [experts, N]
        y = silu(rows.float() @ self.up) @ self.down
        return (share[..., None] * y).sum(dim=0)

    def on_groups(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Each expert on its own rows, which lie one group behind the other: [N, hidden] float32."""
        groups = rows.float().split(list(counts))
        return torch.cat([silu(x @ up) @ down for x, up, down in zip(groups, self.up, self.down, strict=True)])


# How a pair of expert layers is run: (the pair, x [T, hidden], topk_idx [T, K], topk_weights [T, K]) -> x with what
# both have added to it.
RunPair = Callable[[Sequence[Experts], Tensor, Tensor, Tensor], Tensor]


def dense(pair: Sequence[Experts], x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
    """On one rank that has all experts, in float32, without deep_ep."""
    for experts in pair:
        x = x + experts.on_all(normal(x), topk_idx, topk_weights)
    return x


def normal(x: Tensor) -> Tensor:
    return rms_norm(x, x.shape[-1:])


@dataclass(frozen=True)
class Cache:
    """What attention remembers of the bytes so far, in memory that never moves, as a CUDA graph needs it."""

    keys: Tensor  # [sequences, heads, context, hidden / heads]
    values: Tensor
    position: Tensor  # [1] int64: of the byte that comes next; all caches of a model share it

    @staticmethod
    def empty(config: Config, num_sequences: int, position: Tensor) -> Cache:
        shape = (num_sequences, config.heads, config.context, config.hidden // config.heads)
        return Cache(torch.zeros(shape, device=position.device), torch.zeros(shape, device=position.device), position)


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.topk = config.heads, config.topk
        hidden = config.hidden
        self.attention = nn.Parameter(torch.randn(hidden, 3 * hidden) * hidden**-0.5)
        self.project = nn.Parameter(torch.randn(hidden, hidden) * hidden**-0.5)
        self.router = nn.Parameter(torch.randn(hidden, config.experts) * hidden**-0.5)
        self.pair = nn.ModuleList(Experts(config.experts, hidden) for _ in range(2))

    def forward(self, x: Tensor, run_pair: RunPair, cache: Cache | None) -> Tensor:
        x = x + self.attend(normal(x), cache)
        tokens = x.flatten(0, 1)
        return run_pair(self.pair, tokens, *self.route(normal(tokens))).view_as(x)

    def attend(self, x: Tensor, cache: Cache | None) -> Tensor:
        """Over all of x [sequences, bytes, hidden]; or, with a cache, of one byte a sequence over those before it."""
        query, key, value = (x @ self.attention).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is None:
            y = scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            keys = cache.keys.index_copy_(2, cache.position, key)
            values = cache.values.index_copy_(2, cache.position, value)
            seen = torch.arange(keys.shape[2], device=x.device) <= cache.position
            y = scaled_dot_product_attention(query, keys, values, attn_mask=seen[None, None, None])
        return y.transpose(1, 2).flatten(2) @ self.project

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts: topk_idx and topk_weights [T, K]."""
        topk_weights, topk_idx = (x @ self.router).softmax(dim=-1).topk(self.topk)
        return topk_idx, topk_weights


class ByteModel(nn.Module):
    """Call it with bytes [sequences, bytes] to get logits [sequences, bytes, 256] of the bytes that come next."""

    def __init__(self, config: Config, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        torch.manual_seed(seed)  # on the CPU, so that every rank and every machine draws the same
        self.embedding = nn.Parameter(torch.randn(NUM_BYTES, config.hidden))
        self.place = nn.Parameter(torch.randn(config.context, config.hidden) * 0.5)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.readout = nn.Parameter(torch.randn(config.hidden, NUM_BYTES) * 0.5 * config.hidden**-0.5)

    def forward(self, text: Tensor, run_pair: RunPair, caches: Sequence[Cache] | None = None) -> Tensor:
        places = self.place[: text.shape[1]] if caches is None else self.place[caches[0].position]
        x = self.embedding[text.int()] + places
        for block_idx, block in enumerate(self.blocks):
            x = block(x, run_pair, caches and caches[block_idx])
        return normal(x) @ self.readout

    def of_rank(self, rank: int, num_ranks: int) -> ByteModel:
        """Keep those experts alone that live on this rank; returns the model."""
        for experts in self.expert_layers():
            for name, all_of_them in list(experts.named_parameters()):
                setattr(experts, name, nn.Parameter(all_of_them.detach().chunk(num_ranks)[rank].clone()))
        return self

    def expert_layers(self) -> list[Experts]:
        return [experts for block in self.blocks for experts in block.pair]

    def shared(self) -> list[nn.Parameter]:
        """The parameters of which every rank has a copy: all but the experts'."""
        own = {id(parameter) for experts in self.expert_layers() for parameter in experts.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in own]

    def save(self, path: Path) -> None:
        torch.save({"config": asdict(self.config), "weights": self.state_dict()}, path)

    @staticmethod
    def load(path: Path) -> ByteModel:
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            model = ByteModel(Config(**saved["config"]))
            model.load_state_dict(saved["weights"])
        except (pickle.UnpicklingError, EOFError, RuntimeError, LookupError, TypeError) as error:
            raise ValueError(f"{path} is not what train_moe.py --save has left ({type(error).__name__})") from error
        return model


def read_text(files: Sequence[Path]) -> Tensor:
    """The bytes of these files, uint8; of this project's own pages if there are none."""
    pages = files or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *(ROOT / "examples/text").glob("*")]
    return torch.frombuffer(bytearray(b"\n".join(page.read_bytes() for page in pages)), dtype=torch.uint8)
