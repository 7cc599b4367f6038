"""What wrong arguments are told: a TypeError or ValueError with the argument's name, what came and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from deep_ep import validate
from deep_ep.event import EventHandle, EventOverlap
from deep_ep.layout import MAX_EXPERTS, MAX_TOPK

CPU = torch.device("cpu")
BF16 = torch.bfloat16


def refused(kind: type[Exception], text: str, function: Callable[..., Any], *arguments: Any) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        function(*arguments)


def matrix(rows: int, columns: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(rows, columns, dtype=dtype)


def test_tensor() -> None:
    good = matrix(3, 8)
    assert validate.is_tensor("x", good, "TH", BF16, CPU) is good
    for kind, value, text in (
        (TypeError, [[1.0]], "x must be a torch.Tensor [T, H] of torch.bfloat16, but it is a list"),
        (TypeError, None, "x must be a torch.Tensor [T, H] of torch.bfloat16, but it is a NoneType"),
        (TypeError, matrix(3, 8, torch.float16), "x must be torch.bfloat16, but it is torch.float16; convert it with"),
        (ValueError, torch.zeros(8, dtype=BF16), "x must be [T, H], but its shape is [8]"),
        (ValueError, torch.zeros(3, 8, 1, dtype=BF16), "x must be [T, H], but its shape is [3, 8, 1]"),
        (ValueError, good.to("meta"), "x must be on cpu, where this buffer's kernels run, but it is on meta"),
    ):
        refused(kind, text, validate.is_tensor, "x", value, "TH", BF16, CPU)


def test_rows() -> None:
    validate.has_rows("x", matrix(3, 8), 3, "")
    refused(
        ValueError, "x has 3 rows but the handle has 4", validate.has_rows, "x", matrix(3, 8), 4, "the handle has 4"
    )


@pytest.mark.parametrize(
    "good",
    [
        matrix(0, 8),
        matrix(1, 8),
        matrix(5, 64),
        matrix(5, 64)[:, 8:24],  # rows further apart than they are long
        matrix(5, 64)[::2],
        matrix(4, 8)[:, :8],
        matrix(2, 12)[:1, :8],  # the stride of a single row is never used
    ],
)
def test_row_matrix(good: torch.Tensor) -> None:
    assert validate.is_row_matrix("x", good) is good


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (matrix(3, 0), "x has rows of 0 x 2 bytes"),
        (
            matrix(3, 12),
            "x has rows of 12 x 2 bytes; a row must be a positive multiple of 16 bytes: pad",
        ),
        (matrix(0, 12), "x has rows of 12 x 2 bytes"),
        (matrix(8, 16).t(), "x must have contiguous rows, but its strides are (1, 16); call .contiguous()"),
        (matrix(3, 12)[:, :8], "x has a row stride of 12 x 2 bytes; it must be a multiple of 16 bytes"),
        (matrix(1, 8).expand(3, 8), "x has a row stride of 0 x 2 bytes"),
        (matrix(3, 24)[:, 4:12], "x starts at an address that is no multiple of 16 bytes; copy it to one that is"),
    ],
)
def test_rows_that_bulk_copies_cannot_take(bad: torch.Tensor, text: str) -> None:
    refused(ValueError, text, validate.is_row_matrix, "x", bad)


def test_count() -> None:
    assert validate.is_count("num_sms", 0, 0) == 0
    assert validate.is_count("num_sms", 24, 1, 24) == 24
    assert type(validate.is_count("num_sms", np.int64(24), 1, 24)) is int
    for kind, value, text in (
        (TypeError, 2.0, "num_sms must be an int, but it is a float"),
        (TypeError, True, "num_sms must be an int, but it is a bool"),
        (TypeError, "2", "num_sms must be an int, but it is a str"),
        (TypeError, np.float32(2), "num_sms must be an int, but it is a float32"),
        (ValueError, 0, "num_sms must be from 1 to 24, but it is 0; take fewer"),
        (ValueError, 25, "num_sms must be from 1 to 24, but it is 25; take fewer"),
    ):
        refused(kind, text, validate.is_count, "num_sms", value, 1, 24, "take fewer")
    refused(ValueError, "num_sms must be at least 0, but it is -1", validate.is_count, "num_sms", -1, 0)
    too_large = "num_sms must be at least 0 and less than 2**63, but it is 1000000000000000000000000000000"
    refused(ValueError, too_large, validate.is_count, "num_sms", 10**30, 0)


def test_expert_count() -> None:
    assert validate.is_expert_count(256, 8) == 256
    assert type(validate.is_expert_count(np.int32(256), 8)) is int
    for kind, value, text in (
        (ValueError, None, "num_experts must be given unless a handle is"),
        (ValueError, 0, f"num_experts must be from 1 to {MAX_EXPERTS}, but it is 0"),
        (ValueError, MAX_EXPERTS + 8, f"num_experts must be from 1 to {MAX_EXPERTS}, but it is {MAX_EXPERTS + 8}"),
        (ValueError, 30, "num_experts must be a multiple of the group's 8 ranks, but it is 30; pad the experts to 32"),
        (TypeError, 8.0, "num_experts must be an int, but it is a float"),
    ):
        refused(kind, text, validate.is_expert_count, value, 8)


def test_topk_idx() -> None:
    def check(value: Any) -> torch.Tensor:
        return validate.is_topk_idx(value, 4, torch.int64, CPU)

    strided = torch.arange(32).reshape(4, 8)[:, ::2]
    assert check(strided) is strided, "a copy comes later, in the call's own stream"
    for kind, value, text in (
        (ValueError, None, "topk_idx must be given unless a handle is"),
        (TypeError, matrix(4, 2, torch.int32), "topk_idx must be torch.int64, but it is torch.int32"),
        (
            ValueError,
            matrix(3, 2, torch.int64),
            "topk_idx has 3 rows but x has 4; pass one row of expert ids",
        ),
        (ValueError, torch.zeros(4, dtype=torch.int64), "topk_idx must be [T, K], but its shape is [4]"),
        (ValueError, matrix(4, 0, torch.int64), f"topk_idx must have 1 to {MAX_TOPK} selections a token"),
        (ValueError, matrix(4, MAX_TOPK + 1, torch.int64), f"but its shape is [4, {MAX_TOPK + 1}]"),
    ):
        refused(kind, text, check, value)


def test_weights() -> None:
    def check(value: Any) -> torch.Tensor | None:
        return validate.is_weights(value, "topk_weights", 4, 2, CPU)

    assert check(None) is None
    strided = torch.rand(4, 4)[:, ::2]
    assert check(strided) is strided, "a copy comes later, in the call's own stream"
    for kind, value, text in (
        (TypeError, matrix(4, 2), "topk_weights must be torch.float32, but it is torch.bfloat16"),
        (ValueError, torch.rand(4, 3), "topk_weights must be [4, 2], one weight a selection, but its shape is [4, 3]"),
        (ValueError, torch.rand(3, 2), "topk_weights must be [4, 2], one weight a selection, but its shape is [3, 2]"),
    ):
        refused(kind, text, check, value)


def test_selections() -> None:
    validate.are_valid_selections(torch.tensor([[0, 7, -1], [-1, -1, -1]]), 8)
    validate.are_valid_selections(torch.empty(0, 3, dtype=torch.int64), 8)
    for rows, text in (
        ([[0, 1], [8, -2]], "topk_idx[1, 0] is 8, and 2 in all lie outside -1 to 7"),
        ([[0, 1], [2, -2]], "topk_idx[1, 1] is -2, and 1 in all lie outside -1 to 7"),
        ([[0, 1, 2], [5, -1, 5]], "topk_idx[1, 0] and topk_idx[1, 2] are both expert 5; a token selects each expert"),
    ):
        refused(ValueError, text, validate.are_valid_selections, torch.tensor(rows), 8)


def test_biases() -> None:
    def check(value: Any) -> list[torch.Tensor]:
        return validate.biases(value, 3, 8, CPU)

    one, other = matrix(3, 8), matrix(3, 8)
    assert check(None) == []
    assert check(one)[0] is one
    assert [id(bias) for bias in check((one, other))] == [id(one), id(other)]
    assert check([one])[0] is one
    for kind, value, text in (
        (ValueError, (), "bias must be one tensor or a pair, but it has 0 elements"),
        (ValueError, (one, one, one), "bias must be one tensor or a pair, but it has 3 elements"),
        (ValueError, matrix(4, 8), "bias must be [3, 8], but its shape is [4, 8]"),
        (TypeError, matrix(3, 8, torch.float32), "bias must be torch.bfloat16, but it is torch.float32"),
        (TypeError, (one, None), "bias must be a torch.Tensor [T, H] of torch.bfloat16, but it is a NoneType"),
        (ValueError, matrix(8, 3).t(), "bias must have contiguous rows"),
    ):
        refused(kind, text, check, value)


def test_event() -> None:
    for good in (None, EventOverlap(), EventHandle.inert()):
        validate.is_event("previous_event", good)
    text = "previous_event must be an EventOverlap, an EventHandle or None, but it is a int"
    refused(TypeError, text, validate.is_event, "previous_event", 3)


def test_gradients_are_not_lost_without_a_word() -> None:
    x = torch.zeros(1, requires_grad=True)
    with pytest.raises(ValueError, match=r"x requires a gradient, which buffer\.dispatch does not carry; use deep_ep"):
        validate.carries_no_gradient("dispatch", x=x, topk_weights=None)
    with torch.no_grad():
        validate.carries_no_gradient("dispatch", x=x)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("9", TypeError),
        (True, TypeError),
        (0, ValueError),
        (-1, ValueError),
        (float("inf"), ValueError),
        (float("nan"), ValueError),
    ],
)
def test_timeouts(value: object, error: type[Exception]) -> None:
    assert validate.is_timeout("num_gpu_timeout_secs", 9) == 9.0
    assert validate.is_timeout("num_gpu_timeout_secs", np.float32(0.5)) == 0.5
    with pytest.raises(error, match="num_gpu_timeout_secs must be"):
        validate.is_timeout("num_gpu_timeout_secs", value)
