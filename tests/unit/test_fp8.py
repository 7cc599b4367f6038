"""Casts to FP8 and back, against an oracle that works one value at a time."""

from __future__ import annotations

import bisect
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deep_ep.utils import per_token_cast_back, per_token_cast_to_fp8

# Every finite magnitude of float8_e4m3fn by its seven lower bits: 4 of exponent, 3 of fraction.
E4M3 = [(code & 7) / 512 if code < 8 else (1 + (code & 7) / 8) * 2.0 ** ((code >> 3) - 7) for code in range(127)]

ROWS = st.tuples(
    st.integers(0, 2), st.sampled_from([1, 127, 129, 512, 648]), st.integers(-140, 120), st.integers(0, 2**32)
)


def draw(tokens: int, hidden: int, exponent: int, seed: int) -> torch.Tensor:
    """Values of many magnitudes around 2^exponent; whole groups of zeros among them."""
    chance = np.random.default_rng(seed)
    values = chance.standard_normal((tokens, hidden)) * 2.0 ** chance.integers(-6, 6, (tokens, hidden))
    values[chance.random((tokens, hidden)) < 0.1] = 0
    values = np.ldexp(values, exponent).astype(np.float32)
    values[:, :128] *= chance.integers(0, 2, (tokens, 1))
    return torch.from_numpy(values).bfloat16()


def scale_of(group: list[float]) -> np.float32:
    largest = np.float32(max(abs(value) for value in group))
    return max(np.float32(largest / np.float32(448)), np.float32(2.0**-126))


def power_above(scale: np.float32) -> int:
    """The smallest e with 2^e >= scale."""
    return next(exponent for exponent in range(-126, 128) if 2.0**exponent >= float(scale))


def nearest_code(value: np.float32) -> int:
    """The e4m3 code of a value; among two equally near ones, the even one."""
    magnitude = float(abs(value))
    above = bisect.bisect_left(E4M3, magnitude, hi=126)
    code = min((max(above - 1, 0), above), key=lambda c: (abs(E4M3[c] - magnitude), c & 1))
    return code | (128 if math.copysign(1, value) < 0 else 0)


@given(rows=ROWS, packed=st.booleans())
def test_casts(rows: tuple[int, int, int, int], packed: bool) -> None:
    x = draw(*rows)
    x8, sf = per_token_cast_to_fp8(x, use_packed_ue8m0=packed)
    tokens, hidden = x.shape
    groups = -(-hidden // 128)
    assert (x8.dtype, x8.shape) == (torch.float8_e4m3fn, x.shape)
    assert (sf.dtype, sf.shape[1]) == ((torch.int32, -(-groups // 4)) if packed else (torch.float32, groups))
    back = per_token_cast_back(x8, sf)
    assert (back.dtype, back.shape) == (torch.bfloat16, x.shape)

    codes = x8.view(torch.uint8)
    stored = sf.view(torch.uint8) if packed else sf
    for token in range(tokens):
        for group in range(groups):
            values = x[token, group * 128 : group * 128 + 128].tolist()
            scale = scale_of(values)
            if packed:
                exponent = power_above(scale)
                scale = np.float32(2.0**exponent)
                assert stored[token, group] == exponent + 127
            else:
                assert stored[token, group] == scale
            for i, value in enumerate(values, start=group * 128):
                code = nearest_code(np.float32(value) / scale)
                assert codes[token, i] == code, (value, scale)
                product = np.float32(np.copysign(float(E4M3[code & 127]), value)) * scale
                assert back[token, i] == torch.tensor(product).bfloat16()
    if packed:
        assert not stored[:, groups:].any()


@given(rows=ROWS, packed=st.booleans())
def test_what_is_lost(rows: tuple[int, int, int, int], packed: bool) -> None:
    """A 16th of a value, or 1/1024 of its group's scale; next to nothing where FP8 holds the values themselves."""
    x = draw(*rows)
    x8, sf = per_token_cast_to_fp8(x, use_packed_ue8m0=packed)
    back = per_token_cast_back(x8, sf, torch.float32)
    for token in range(x.shape[0]):
        for first in range(0, x.shape[1], 128):
            values, returned = x[token, first : first + 128].double(), back[token, first : first + 128].double()
            scale = float(scale_of(values.tolist())) * (2 if packed else 1)
            assert ((values - returned).abs() <= (values.abs() / 16).clamp(min=scale / 1024) * (1 + 2**-20)).all()


@pytest.mark.parametrize("packed", [False, True])
def test_scale_factors_of_any_strides(packed: bool) -> None:
    x = draw(5, 640, 0, 1)
    x8, sf = per_token_cast_to_fp8(x, use_packed_ue8m0=packed)
    by_columns = sf.t().contiguous().t()
    assert torch.equal(per_token_cast_back(x8, by_columns), per_token_cast_back(x8, sf))
    one = torch.empty(8, dtype=sf.dtype).as_strided((5, 1), (1, 8)).copy_(sf[:, :1])  # a single column, aligned
    assert torch.equal(per_token_cast_back(x8[:, :128], one), per_token_cast_back(x8[:, :128], sf[:, :1]))
    wide = torch.zeros(5, 640, dtype=torch.bfloat16)
    wide.copy_(x)
    assert torch.equal(per_token_cast_to_fp8(wide[::2], packed)[1], sf[::2])


def test_wrong_arguments() -> None:
    x8, sf = per_token_cast_to_fp8(torch.ones(3, 256))
    with pytest.raises(TypeError, match=r"x must be of a floating point dtype, but it is torch\.int64"):
        per_token_cast_to_fp8(torch.ones(3, 256, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x must have 2 dimensions, but its shape is \[256\]"):
        per_token_cast_to_fp8(torch.ones(256))
    with pytest.raises(ValueError, match=r"sf must be \[3, 2\] for x8 of \[3, 256\], but its shape is \[3, 1\]"):
        per_token_cast_back(x8, sf[:, :1])
    with pytest.raises(TypeError, match=r"sf must be float32, or int32 that packs UE8M0, but it is torch\.float64"):
        per_token_cast_back(x8, sf.double())
