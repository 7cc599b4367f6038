"""Gradients and torch.compile: the operators one by one on one rank, and layers over several (gradients.py)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import library

import deep_ep
from deep_ep import ElasticBuffer, autograd
from tests.elastic.ranks import torchrun

TOKENS, HIDDEN, TOPK, EXPERTS = 5, 32, 3, 4


@pytest.mark.slow
def test_layers_on_simulated_ranks() -> None:
    """Three ranks, of which one has no tokens."""
    assert "7 parts: OK" in torchrun(3, "tests.elastic.gradients").check()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_layers_on_gpus(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs in one NVLink domain, this host has {torch.cuda.device_count()}")
    options = ("--machine", "cuda", "--backend", backend)
    assert "7 parts: OK" in torchrun(2, "tests.elastic.gradients", *options, CUDA_VISIBLE_DEVICES="0,1").check()


@pytest.fixture(scope="module")
def buffer() -> Iterator[ElasticBuffer]:
    """Of one simulated rank, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        group = dist.group.WORLD
        assert group is not None
        buffer = ElasticBuffer(group, num_max_tokens_per_rank=8, hidden=HIDDEN)
        yield buffer
        buffer.destroy()
        dist.destroy_process_group()


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(1)
    idx = torch.rand(TOKENS, EXPERTS, generator=chance).argsort(dim=1)[:, :TOPK].to(deep_ep.topk_idx_t)
    idx[2, 1] = -1
    x = torch.randn(TOKENS, HIDDEN, generator=chance).bfloat16().requires_grad_()
    return x, idx, torch.rand(TOKENS, TOPK, generator=chance).requires_grad_()


def without_number(dispatch: Callable[..., Any]) -> Callable[..., Any]:
    """Routes have another number in every call; torch compares what two calls return, which is the same in all else."""

    def changed(*args: Any, **kwargs: Any) -> Any:
        result = dispatch(*args, **kwargs)
        result[3].number.zero_()
        return result

    return changed


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("with_weights", [False, True])
def test_operators_are_what_they_say(buffer: ElasticBuffer, exact: bool, expand: bool, with_weights: bool) -> None:
    """Schemas, fake shapes and gradients, as torch's own checks want them."""
    x, idx, weights = inputs()
    # The host's wait for counts looks at them through NumPy, which this one takes for an alias.
    schema = () if exact else ("test_schema",)
    utils = (*schema, "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    numbers = [EXPERTS, 8, 4, 2]
    given = weights if with_weights else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ElasticBuffer, "dispatch", without_number(ElasticBuffer.dispatch))
        library.opcheck(autograd._find, (x, idx, given, buffer._key, numbers, expand, exact), test_utils=utils)
    recv_x, _, recv_weights, handle = autograd.dispatch(
        buffer, x, idx, given, num_experts=EXPERTS, expert_alignment=4, do_cpu_sync=exact, do_expand=expand
    )
    route = autograd.Route.of(handle)
    library.opcheck(autograd._follow, (x, given, *route, buffer._key, expand, len(recv_x)))
    rows = recv_x.detach().requires_grad_()
    row_weights = None if recv_weights is None else recv_weights.detach().requires_grad_()
    biases = [torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16, requires_grad=True)] * 2
    library.opcheck(autograd._combine, (rows, row_weights, biases, *route, buffer._key, expand))


@pytest.mark.parametrize("expand", [False, True])
def test_rows_without_a_token_are_zeros(buffer: ElasticBuffer, expand: bool) -> None:
    """Whatever their memory held; so are their weights, and the gradients of what combine did not read."""
    x, idx, weights = inputs()
    for _ in range(3):
        torch.full((200, HIDDEN), torch.nan, dtype=torch.bfloat16)  # what the next allocation may find
        recv_x, recv_idx, recv_weights, handle = autograd.dispatch(
            buffer, x, idx, weights, num_experts=EXPERTS, expert_alignment=4, do_cpu_sync=False, do_expand=expand
        )
        used = torch.zeros(len(recv_x), dtype=torch.bool)
        rows = handle.recv_src_metadata[: int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])]
        used[rows[:, 2:][rows[:, 2:] >= 0].long() if expand else range(len(rows))] = True
        assert not recv_x[~used].any()
        assert recv_weights is not None
        assert not recv_weights[~used].any()
        if recv_idx is not None:
            assert bool((recv_weights == 0).eq(recv_idx < 0).all())
        leaf = recv_x.detach().requires_grad_()
        combined, _ = autograd.combine(buffer, leaf, handle)
        combined.sum().backward()
        assert leaf.grad is not None
        assert bool((leaf.grad[used] == 1).all())
        assert not leaf.grad[~used].any()


def test_a_buffer_that_is_gone_is_named(buffer: ElasticBuffer) -> None:
    x, idx, _ = inputs()
    with pytest.raises(ValueError, match="the buffer of this operation is gone"):
        autograd._find(x, idx, None, 1 << 40, [EXPERTS, 8, 1, 2], False, False)
    with pytest.raises(ValueError, match="topk_idx must be given unless a handle is"):
        autograd.dispatch(buffer, x)
    with pytest.raises(ValueError, match="topk_idx has 4 rows but x has 5"):
        autograd.dispatch(buffer, x, idx[:4], num_experts=EXPERTS)


def test_names_are_those_of_the_class() -> None:
    """Whoever goes from a method to a function finds the arguments under their names."""
    for ours, method in ((autograd.dispatch, ElasticBuffer.dispatch), (autograd.combine, ElasticBuffer.combine)):
        assert set(inspect.signature(ours).parameters) - {"buffer"} <= set(inspect.signature(method).parameters)
