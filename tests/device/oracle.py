"""What the primitives must give, in numpy, from the words of the contract: no code in common with either back end."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]


def warp(values: Words) -> Words:
    """Twelve words for each lane of each warp, as kernels/warp.cuh lists them."""
    rows = []
    for lanes in values.reshape(-1, 32):
        wide = [(int(v) % 5) << 40 | int(v) % 3 for v in lanes]
        signed = [int(np.int32(v)) for v in lanes.view(np.int32)]
        for lane, value in enumerate(int(v) for v in lanes):
            chosen = value % 32
            rows.append(
                [
                    sum((int(v) % 2) << i for i, v in enumerate(lanes)),
                    any(int(v) % 64 == 0 for v in lanes),
                    all(int(v) % 64 != 0 for v in lanes),
                    int(lanes[chosen]),
                    wide[chosen] >> 32,
                    wide[chosen] & 0xFFFFFFFF,
                    sum((int(v) % 4 == value % 4) << i for i, v in enumerate(lanes)),
                    sum((w == wide[lane]) << i for i, w in enumerate(wide)),
                    sum(signed) % 2**32,
                    max(signed) % 2**32,
                    sum(signed[: lane + 1]) % 2**32,
                    bin(value & (2**lane - 1)).count("1"),
                ]
            )
    return np.array(rows, dtype=np.uint32)


def bf16_from_float(bits: Words) -> Words:
    """Nearest bfloat16, found among the two neighbours by distance in float64; ties to the even one."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        values = bits.view(np.float32).astype(np.float64)
    magnitude = bits & 0x7FFFFFFF
    low = magnitude >> 16  # the neighbour towards zero
    high = low + 1
    with np.errstate(invalid="ignore"):
        # The neighbour beyond the largest finite value counts as where it would be if there were no infinity.
        to_low = np.abs(values) - _magnitude_of_bf16(low)
        to_high = _magnitude_of_bf16(high) - np.abs(values)
        picked = np.where((to_low < to_high) | ((to_low == to_high) & (low % 2 == 0)), low, high)
    picked = np.where(magnitude == 0x7F800000, 0x7F80, picked)
    picked = picked | (bits >> 31 << 15)
    return np.where(magnitude > 0x7F800000, 0x7FFF, picked).astype(np.uint32)


def _magnitude_of_bf16(half: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    exponent = (half >> 7).astype(np.int64)
    mantissa = (half & 127).astype(np.float64)
    normal = np.ldexp(1 + mantissa / 128, exponent - 127)
    return np.where(exponent == 0, np.ldexp(mantissa / 128, -126), normal)


def e4m3_values() -> npt.NDArray[np.float64]:
    """The value of each of the 128 magnitudes of e4m3; the last is NaN."""
    values = []
    for code in range(128):
        exponent, mantissa = code >> 3, code & 7
        values.append(mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    values[127] = np.nan
    return np.array(values)


def e4m3_from_float(bits: Words) -> Words:
    """Nearest e4m3 by search among all magnitudes; ties to the even code; beyond the largest saturates."""
    table = e4m3_values()[:127]
    with np.errstate(invalid="ignore"):
        values = np.abs(bits.view(np.float32).astype(np.float64))
        high = np.searchsorted(table, values).clip(0, 126)
        low = (high - 1).clip(0)
        to_low, to_high = values - table[low], table[high] - values
        picked = np.where((to_low < to_high) | ((to_low == to_high) & (low % 2 == 0)), low, high)
    picked = picked | (bits >> 31 << 7)
    return np.where(np.isnan(values), 0x7F, picked).astype(np.uint32)


def float_from_e4m3(codes: Words) -> Words:
    values = e4m3_values()[codes & 127].astype(np.float32)
    signed = values.view(np.uint32) | (codes >> 7 << 31)
    return np.where((codes & 127) == 127, 0x7FFFFFFF, signed).astype(np.uint32)
