"""What calls with gradients say to wrong arguments: what the buffer's own methods say, and nothing of torch's own."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import deep_ep
from deep_ep import ElasticBuffer, autograd
from deep_ep.utils import per_token_cast_to_fp8
from tests.unit.fake_machine import HIDDEN, FakeMachine, dispatch

TOKENS, TOPK, EXPERTS = 3, 2, 4
X = torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16)
GOOD = {
    "x": X,
    "topk_idx": torch.tensor([[0, 1]] * TOKENS, dtype=deep_ep.topk_idx_t),
    "num_experts": EXPERTS,
    "do_cpu_sync": False,
}
BY_HANDLE: dict[str, Any] = {"x": X}


@pytest.fixture
def handle(buffer: ElasticBuffer) -> deep_ep.EPHandle:
    return dispatch(buffer, do_cpu_sync=False, expert_alignment=2)


MISTAKES = {
    "num_experts": [("4", TypeError), (4.0, TypeError), (0, ValueError), (None, ValueError)],
    "expert_alignment": [("4", TypeError), (0, ValueError)],
    "num_max_tokens_per_rank": [(4.0, TypeError), (0, ValueError), (2, ValueError)],
    "num_sms": [(-1, ValueError), ("a", TypeError)],
    "do_cpu_sync": [(2, TypeError), ("no", TypeError)],
    "do_expand": [(1, TypeError), (None, TypeError)],
    "topk_idx": [(None, ValueError), ([[0, 1]] * TOKENS, TypeError), (GOOD["topk_idx"][:2], ValueError)],
    "topk_weights": [([1.0], TypeError), (torch.ones(TOKENS, TOPK, dtype=torch.float64), TypeError)],
    "x": [(None, TypeError), (per_token_cast_to_fp8(torch.zeros(TOKENS, 128)), TypeError), (X.float(), TypeError)],
    "buffer": [(None, TypeError)],
    "handle": [(7, TypeError)],
}


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [(name, value, kind) for name, mistakes in MISTAKES.items() for value, kind in mistakes],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_dispatch_names_the_argument(
    buffer: ElasticBuffer, machine: FakeMachine, name: str, value: Any, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=name) as caught:
        autograd.dispatch(**{"buffer": buffer, **GOOD, name: value})
    assert len(str(caught.value)) < 300, "no tensors in it"
    assert not machine.launches


@pytest.mark.parametrize(
    "given",
    [{"num_experts": 8}, {"expert_alignment": 1}, {"num_max_tokens_per_rank": 4}, {"topk_idx": GOOD["topk_idx"]}],
)
def test_a_handle_is_not_contradicted(
    buffer: ElasticBuffer, machine: FakeMachine, handle: deep_ep.EPHandle, given: dict[str, Any]
) -> None:
    (name,) = given
    before = len(machine.launches)
    texts = []
    for call in (autograd.dispatch, ElasticBuffer.dispatch):
        with pytest.raises(ValueError, match=f"^{name} ") as caught:
            call(buffer, X, handle=handle, **given)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    assert len(machine.launches) == before
    autograd.dispatch(buffer, X, handle=handle, num_experts=4, expert_alignment=2, num_max_tokens_per_rank=8)


def test_none_means_what_it_means_in_the_method(buffer: ElasticBuffer, machine: FakeMachine) -> None:
    """The host waits, and counts are not aligned."""
    machine.on_launch = lambda: machine.report_counts(3, 1, 0, 2, 5)
    for given in ({"do_cpu_sync": None, "expert_alignment": None}, {"do_cpu_sync": True}):
        recv_x, _, _, handle = autograd.dispatch(buffer, **{**GOOD, **given})
        assert (len(recv_x), handle.num_recv_tokens_per_expert_list) == (3, [1, 0, 2, 5])
        assert handle.expert_alignment == 1


COMBINE_MISTAKES = [
    ("handle", None, TypeError),
    ("handle", "h", TypeError),
    ("buffer", None, TypeError),
    ("x", (X, X), TypeError),
    ("x", X[:2], ValueError),
    ("x", X[0, 0], ValueError),
    ("x", X.float(), TypeError),
    ("topk_weights", 1.0, TypeError),
    ("bias", 5, TypeError),
    ("bias", X[:2], ValueError),
]


@pytest.mark.parametrize(("name", "value", "kind"), COMBINE_MISTAKES)
def test_combine_names_the_argument(
    buffer: ElasticBuffer,
    machine: FakeMachine,
    handle: deep_ep.EPHandle,
    name: str,
    value: Any,
    kind: type[Exception],
) -> None:
    before = len(machine.launches)
    rows = torch.zeros(handle.num_recv_tokens, HIDDEN, dtype=torch.bfloat16)
    with pytest.raises(kind, match=f"^{name} ") as caught:
        autograd.combine(**{"buffer": buffer, "x": rows, "handle": handle, name: value})
    assert "tensor(" not in str(caught.value)
    assert len(machine.launches) == before


def test_the_module_is_there_when_it_is_asked_for() -> None:
    """Errors recommend deep_ep.autograd; importing deep_ep alone does not import it."""
    code = (
        "import sys, deep_ep; assert 'deep_ep.autograd' not in sys.modules; print(deep_ep.autograd.dispatch.__name__)\n"
        "try: deep_ep.nothing\nexcept AttributeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines() == ["dispatch", "module 'deep_ep' has no attribute 'nothing'"]
