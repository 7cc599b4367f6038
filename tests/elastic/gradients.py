"""One rank of a job that trains: gradients through dispatch and combine, eager and compiled.

torchrun --nproc-per-node 2 -m tests.elastic.gradients [--machine cuda] [--backend inductor]

The reference is a dense mixture of experts in float64 over all ranks' tokens, which knows nothing of ranks. With small
whole numbers every product and sum is exact in bfloat16, so outputs and gradients must be the reference's to the bit;
with experts that are not linear they are close.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

import deep_ep
from deep_ep import ElasticBuffer, autograd
from tests.elastic import ranks

HIDDEN, TOPK, LOCAL = 32, 3, 2  # elements, selections, experts of a rank
MOST = 12
SETTINGS = tuple(itertools.product((True, False), (False, True)))  # do_cpu_sync, do_expand


@dataclass(frozen=True)
class Layer:
    """All ranks' inputs and experts, the same on every rank; and what multiplies each output in the loss."""

    x: list[Tensor]  # [T, H] bfloat16, by rank
    topk_idx: list[Tensor]
    topk_weights: list[Tensor]
    bias: list[Tensor]  # [T, H] bfloat16
    up: Tensor  # [experts, H, H] bfloat16
    loss_weights: list[Tensor]  # [T, H]

    @staticmethod
    def draw(seed: int, num_ranks: int, exact: bool) -> Layer:
        chance = torch.Generator().manual_seed(seed)
        tokens = [(5 + 3 * rank) % 8 for rank in range(num_ranks)]  # one rank may have none
        experts = LOCAL * num_ranks

        def numbers(*shape: int, most: int) -> Tensor:
            if exact:
                return torch.randint(-most, most + 1, shape, generator=chance).bfloat16()
            return torch.randn(shape, generator=chance).bfloat16()

        def weights(count: int) -> Tensor:
            if exact:
                return torch.randint(1, 3, (count, TOPK), generator=chance).float()
            return torch.rand(count, TOPK, generator=chance)

        def choices(count: int) -> Tensor:
            idx = torch.rand(count, experts, generator=chance).argsort(dim=1)[:, :TOPK]
            return idx.masked_fill(torch.rand(count, TOPK, generator=chance) < 0.2, -1)

        diagonal = torch.randint(1, 3, (experts, 1, HIDDEN), generator=chance) * torch.eye(HIDDEN)
        return Layer(
            x=[numbers(count, HIDDEN, most=4) for count in tokens],
            topk_idx=[choices(count) for count in tokens],
            topk_weights=[weights(count) for count in tokens],
            bias=[numbers(count, HIDDEN, most=3) for count in tokens],
            up=diagonal.bfloat16() if exact else numbers(experts, HIDDEN, HIDDEN, most=1) * HIDDEN**-0.5,
            loss_weights=[numbers(count, HIDDEN, most=2) for count in tokens],
        )

    def dense(self, exact: bool) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """Outputs by rank, and the gradients of the sum of all ranks' losses, in float64."""
        x, weights, bias = (
            [each.double().requires_grad_() for each in part] for part in (self.x, self.topk_weights, self.bias)
        )
        up = self.up.double().requires_grad_()
        outputs = []
        for own_x, own_weights, own_bias, idx in zip(x, weights, bias, self.topk_idx, strict=True):
            y = own_bias
            for k in range(TOPK):
                chosen = torch.einsum("th,thf->tf", own_x, up[idx[:, k].clamp(min=0)])
                chosen = chosen if exact else silu(chosen)
                y = y + chosen * (own_weights[:, k] * (idx[:, k] >= 0))[:, None]
            outputs.append(y)
        torch.stack([(y * c.double()).sum() for y, c in zip(outputs, self.loss_weights, strict=True)]).sum().backward()
        gradients = {"x": x, "topk_weights": weights, "bias": bias, "up": [up]}
        return outputs, {name: [each.grad for each in part] for name, part in gradients.items()}


@dataclass
class Trainee:
    """One rank's leaves."""

    buffer: ElasticBuffer
    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    bias: Tensor
    up: Tensor  # [local experts, H, H]

    @staticmethod
    def of(layer: Layer, buffer: ElasticBuffer, device: torch.device) -> Trainee:
        rank = buffer.rank_idx

        def leaf(value: Tensor) -> Tensor:
            return value.to(device, copy=True).requires_grad_()

        return Trainee(
            buffer,
            leaf(layer.x[rank]),
            layer.topk_idx[rank].to(device, deep_ep.topk_idx_t),
            leaf(layer.topk_weights[rank]),
            leaf(layer.bias[rank]),
            leaf(layer.up[rank * LOCAL : (rank + 1) * LOCAL]),
        )

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {"x": self.x, "topk_weights": self.topk_weights, "bias": self.bias, "up": self.up}


def moe(
    buffer: ElasticBuffer,
    leaves: tuple[Tensor, ...],
    topk_idx: Tensor,
    exact: bool,
    do_cpu_sync: bool,
    do_expand: bool,
    handle: deep_ep.EPHandle | None = None,
) -> Tensor:
    """The layer over ranks: products over all rows, of which some hold no token."""
    x, topk_weights, bias, up = leaves
    if handle is None:
        recv_x, recv_idx, weights, handle = autograd.dispatch(
            buffer,
            x,
            topk_idx,
            topk_weights,
            num_experts=LOCAL * buffer.num_ranks,
            expert_alignment=4,
            do_cpu_sync=do_cpu_sync,
            do_expand=do_expand,
        )
    else:
        recv_x, recv_idx, weights, handle = autograd.dispatch(
            buffer, x, topk_weights=topk_weights, handle=handle, do_expand=do_expand
        )
    assert weights is not None
    y = torch.einsum("nh,ehf->enf", recv_x, up)
    y = y if exact else silu(y.float())
    if recv_idx is not None:
        of_expert = torch.stack([(weights * (recv_idx == e)).sum(dim=1) for e in range(LOCAL)])
    else:
        # Each expert's rows end where the sums of aligned counts do, and rows behind them have weights of zero.
        ends = handle.per_expert_aligned
        expert = (torch.arange(len(recv_x), device=ends.device)[:, None] >= ends).sum(dim=1)
        of_expert = torch.stack([weights * (expert == e) for e in range(LOCAL)])
    rows = (y.float() * of_expert[..., None]).sum(dim=0).bfloat16()
    combined, _ = autograd.combine(buffer, rows, handle, bias=bias)
    return combined


def check(name: str, got: Tensor | None, expected: Tensor, exact: bool) -> None:
    assert got is not None, f"{name} has no gradient"
    got = got.detach().double().cpu()
    if exact:
        assert torch.equal(got, expected.detach()), f"{name} differs by {(got - expected).abs().max()}"
        return
    scale = expected.detach().abs().max().clamp(min=1e-3) if expected.numel() else 1.0
    worst = (got - expected.detach()).abs().max() / scale if expected.numel() else 0.0
    assert worst < 0.03, f"{name} differs by {worst} of its largest value"


def run(layer: Layer, trainee: Trainee, exact: bool, forward: Callable[[tuple[Tensor, ...], Tensor], Tensor]) -> None:
    """Forward, backward, and the reference's opinion of both."""
    rank = trainee.buffer.rank_idx
    outputs, gradients = layer.dense(exact)
    for leaf in trainee.leaves.values():
        leaf.grad = None
    y = forward(tuple(trainee.leaves.values()), trainee.topk_idx)
    (y.float() * layer.loss_weights[rank].to(y.device).float()).sum().backward()
    check("the output", y, outputs[rank], exact)
    for name, leaf in trainee.leaves.items():
        expected = gradients[name][0][rank * LOCAL : (rank + 1) * LOCAL] if name == "up" else gradients[name][rank]
        check(f"the gradient of {name}", leaf.grad, expected, exact)


def eager(buffer: ElasticBuffer, device: torch.device) -> None:
    for seed, exact in ((1, True), (2, False)):
        layer = Layer.draw(seed, buffer.num_ranks, exact)
        trainee = Trainee.of(layer, buffer, device)
        for settings in SETTINGS:
            run(layer, trainee, exact, lambda leaves, idx, s=settings, e=exact: moe(buffer, leaves, idx, e, *s))


def by_a_handle(buffer: ElasticBuffer, device: torch.device) -> None:
    """The routes of a dispatch that carried something else, in both layouts."""
    layer = Layer.draw(3, buffer.num_ranks, exact=True)
    trainee = Trainee.of(layer, buffer, device)
    for do_cpu_sync, do_expand in SETTINGS:
        handle = buffer.dispatch(
            trainee.x.detach(),
            trainee.topk_idx,
            num_experts=LOCAL * buffer.num_ranks,
            expert_alignment=4,
            do_cpu_sync=do_cpu_sync,
        )[3]
        run(layer, trainee, True, lambda leaves, idx, h=handle, e=do_expand: moe(buffer, leaves, idx, True, True, e, h))


def checkpointed(buffer: ElasticBuffer, device: torch.device) -> None:
    """All ranks make the forward calls again, in their backward pass."""
    layer = Layer.draw(4, buffer.num_ranks, exact=True)
    trainee = Trainee.of(layer, buffer, device)
    run(
        layer,
        trainee,
        True,
        lambda leaves, idx: checkpoint(moe, buffer, leaves, idx, True, False, True, use_reentrant=False),
    )


def compiled(buffer: ElasticBuffer, device: torch.device, backend: str) -> None:
    """Without a graph break where the host waits for nothing, and with one where it does."""
    for do_cpu_sync, do_expand in SETTINGS:
        torch._dynamo.reset()
        forward = torch.compile(moe, backend=backend, fullgraph=not do_cpu_sync)
        for seed in (5, 6):
            layer = Layer.draw(seed, buffer.num_ranks, exact=True)
            trainee = Trainee.of(layer, buffer, device)
            run(
                layer,
                trainee,
                True,
                lambda leaves, idx, f=forward, s=do_cpu_sync, e=do_expand: f(buffer, leaves, idx, True, s, e),
            )


def refused(buffer: ElasticBuffer, device: torch.device, backend: str) -> None:
    """A whole graph in which the host would wait; the message says what to do."""
    layer = Layer.draw(8, buffer.num_ranks, exact=True)
    trainee = Trainee.of(layer, buffer, device)
    torch._dynamo.reset()
    forward = torch.compile(moe, backend=backend, fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"deep_ep\.autograd\.dispatch takes do_cpu_sync=False"):
        forward(buffer, tuple(trainee.leaves.values()), trainee.topk_idx, True, True, False)


def contradicted(buffer: ElasticBuffer, device: torch.device, backend: str) -> None:
    """By an argument, where it is traced."""
    x = torch.zeros(2, HIDDEN, dtype=torch.bfloat16, device=device)
    idx = torch.zeros(2, 1, dtype=deep_ep.topk_idx_t, device=device)
    handle = buffer.dispatch(x, idx, num_experts=LOCAL * buffer.num_ranks)[3]
    torch._dynamo.reset()
    again = torch.compile(autograd.dispatch, backend=backend)
    recv_x, *_ = again(buffer, x, handle=handle, expert_alignment=1)
    assert len(recv_x) == handle.num_recv_tokens
    with pytest.raises(ValueError, match="expert_alignment is 4 but the handle's dispatch had 1"):
        again(buffer, x, handle=handle, expert_alignment=4)


def compiled_by_a_handle(buffer: ElasticBuffer, device: torch.device, backend: str) -> None:
    layer = Layer.draw(7, buffer.num_ranks, exact=True)
    trainee = Trainee.of(layer, buffer, device)
    torch._dynamo.reset()
    forward = torch.compile(moe, backend=backend, fullgraph=True)
    for do_cpu_sync in (True, False):
        handle = buffer.dispatch(
            trainee.x.detach(),
            trainee.topk_idx,
            num_experts=LOCAL * buffer.num_ranks,
            expert_alignment=4,
            do_cpu_sync=do_cpu_sync,
        )[3]
        run(layer, trainee, True, lambda leaves, idx, h=handle: forward(buffer, leaves, idx, True, True, False, h))


EAGER = (eager, by_a_handle, checkpointed)
COMPILED = (compiled, refused, contradicted, compiled_by_a_handle)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machine", choices=ranks.MACHINES, default="simulated")
    parser.add_argument("--backend", default="aot_eager", help="of torch.compile")
    arguments = parser.parse_args()
    group, device = ranks.join(arguments.machine)
    buffer = ElasticBuffer(group, num_max_tokens_per_rank=MOST, hidden=HIDDEN)
    parts = [*EAGER, *(functools.partial(part, backend=arguments.backend) for part in COMPILED)]
    for part in parts:
        part(buffer, device)
    if group.rank() == 0:
        print(f"{len(parts)} parts: OK", flush=True)
    buffer.destroy()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
