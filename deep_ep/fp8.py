"""Rows of bfloat16 as FP8 with scale factors, and back: one factor for every 128 values of a row.

What the two functions compute is fixed to the bit, on every machine:

- A group is 128 consecutive values of a row; the last one may be shorter. ``largest`` is its largest magnitude.
- Its scale is ``largest / 448`` in float32 (448 is the largest float8_e4m3fn), but at least 2^-126. As UE8M0, a byte e
  that stands for 2^(e - 127), it is the smallest power of two that is no less.
- A value becomes ``value / scale``, rounded to float32 and then to float8_e4m3fn, ties to even.
- Back: ``value * scale``, rounded to float32 and then to the wanted dtype.

So, but for roundings to float32 and to the wanted dtype, a value comes back within 1/16 of itself, or within
``scale / 1024`` if that is more.

Values must be finite.
"""

from __future__ import annotations

import torch

GROUP = 128  # values that share a scale factor
LARGEST = 448.0  # float8_e4m3fn
SMALLEST_SCALE = 2.0**-126  # the smallest normal float32
BIAS = 127  # of the exponents of UE8M0
PACKED = 4  # UE8M0 bytes in an int32; the first group's is the lowest


def per_token_cast_to_fp8(x: torch.Tensor, use_packed_ue8m0: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rows, as dispatch takes them.

    Args:
        x: [T, H] of any floating point dtype.
        use_packed_ue8m0: scale factors are powers of two, four in an int32; bytes without a group are 0.

    Returns:
        ``(x8 [T, H] float8_e4m3fn, sf [T, P])``; sf is float32 with P = H / 128, or int32 with P = H / 512, rounded up.

    Raises:
        ValueError, TypeError: x is no matrix of numbers.
    """
    _is_matrix("x", x)
    if not x.is_floating_point():
        raise TypeError(f"x must be of a floating point dtype, but it is {x.dtype}")
    num_tokens, hidden = x.shape
    groups = -(-hidden // GROUP)
    padded = torch.nn.functional.pad(x.float(), (0, groups * GROUP - hidden)).view(num_tokens, groups, GROUP)
    scale = (padded.abs().amax(dim=2) / LARGEST).clamp(min=SMALLEST_SCALE)
    if use_packed_ue8m0:
        exponents = _exponents_above(scale)
        scale = _powers_of_two(exponents)
    x8 = (padded / scale[:, :, None]).to(torch.float8_e4m3fn).view(num_tokens, groups * GROUP)[:, :hidden].contiguous()
    if not use_packed_ue8m0:
        return x8, scale
    return x8, torch.nn.functional.pad(exponents, (0, -groups % PACKED)).to(torch.uint8).view(torch.int32)


def per_token_cast_back(x8: torch.Tensor, sf: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Undo per_token_cast_to_fp8, up to what rounding lost.

    Args:
        x8: [rows, H] float8_e4m3fn.
        sf: [rows, P] float32, or int32 of packed UE8M0; any strides, as dispatch returns them.
        dtype: of the result.

    Returns:
        [rows, H]

    Raises:
        ValueError, TypeError: shapes or dtypes do not go together.
    """
    _is_matrix("x8", x8)
    _is_matrix("sf", sf)
    (rows, hidden), groups = x8.shape, -(-x8.shape[1] // GROUP)
    if sf.dtype not in (torch.float32, torch.int32):
        raise TypeError(f"sf must be float32, or int32 that packs UE8M0, but it is {sf.dtype}")
    expected = (rows, groups if sf.dtype == torch.float32 else -(-groups // PACKED))
    if tuple(sf.shape) != expected:
        raise ValueError(f"sf must be {list(expected)} for x8 of {list(x8.shape)}, but its shape is {list(sf.shape)}")
    scale = sf
    if sf.dtype == torch.int32:
        shifts = 8 * torch.arange(PACKED, dtype=torch.int32, device=sf.device)
        scale = _powers_of_two((sf[:, :, None] >> shifts & 0xFF).flatten(1)[:, :groups])
    return (x8.float() * scale.repeat_interleave(GROUP, dim=1)[:, :hidden]).to(dtype)


def _exponents_above(scale: torch.Tensor) -> torch.Tensor:
    """The biased exponent of the smallest power of two that is no less; ``scale`` is positive, normal float32."""
    bits = scale.view(torch.int32)
    has_fraction = (bits & 0x7FFFFF) != 0
    return (bits >> 23) + has_fraction


def _powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """float32 of biased exponents: they are its very bits, but that 0 stands for a subnormal."""
    return torch.where(exponents == 0, 2.0**-BIAS, (exponents << 23).view(torch.float32))


def _is_matrix(name: str, value: torch.Tensor) -> None:
    if value.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions, but its shape is {list(value.shape)}")
