// bfloat16 and e4m3 (float8_e4m3fn) to and from float: exact, or round to nearest even. Subnormals and signed zeros
// are kept. The same bits as the GPU's instructions give; docs/primitives.md lists the corner cases.
#pragma once

#include <deep_ep/device/sim/language.cuh>

namespace deep_ep::device {

struct Float2 {
  float x, y;
};

namespace detail {

EP_DEVICE std::uint32_t float_bits(float value) { return __builtin_bit_cast(std::uint32_t, value); }
EP_DEVICE float bits_float(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }

// Drops the `num_bits` lowest bits, 1 to 31, rounding to nearest, ties to even.
EP_DEVICE std::uint32_t round_off(std::uint32_t value, int num_bits) {
  const std::uint32_t just_below_half = (1u << (num_bits - 1)) - 1;
  return (value + just_below_half + ((value >> num_bits) & 1)) >> num_bits;
}

}  // namespace detail

// A bfloat16 is the upper half of a float.
EP_DEVICE float bf16_to_float(std::uint16_t value) {
  return detail::bits_float(static_cast<std::uint32_t>(value) << 16);
}

// Overflow gives infinity; any NaN gives 0x7FFF.
EP_DEVICE std::uint16_t float_to_bf16(float value) {
  if (value != value) return 0x7fff;
  return static_cast<std::uint16_t>(detail::round_off(detail::float_bits(value), 16));
}

// x is the low half.
EP_DEVICE Float2 bf16x2_to_float2(std::uint32_t pair) {
  return {bf16_to_float(static_cast<std::uint16_t>(pair)), bf16_to_float(static_cast<std::uint16_t>(pair >> 16))};
}

EP_DEVICE std::uint32_t float2_to_bf16x2(Float2 values) {
  return static_cast<std::uint32_t>(float_to_bf16(values.y)) << 16 | float_to_bf16(values.x);
}

// Both NaNs (0x7F, 0xFF) give the positive quiet NaN 0x7FFFFFFF.
EP_DEVICE float e4m3_to_float(std::uint8_t value) {
  const std::uint32_t sign = static_cast<std::uint32_t>(value & 0x80) << 24;
  const std::uint32_t exponent = (value >> 3) & 15, mantissa = value & 7;
  if (exponent == 15 && mantissa == 7) return detail::bits_float(0x7fffffff);
  if (exponent == 0) {  // a multiple of the subnormal step, 2^-9
    const float magnitude = static_cast<float>(mantissa) * 0x1p-9f;
    return detail::bits_float(sign | detail::float_bits(magnitude));
  }
  return detail::bits_float(sign | (exponent + 127 - 7) << 23 | mantissa << 20);
}

// Saturates: infinities and whatever rounds beyond 448 give 448 with their sign. Any NaN gives 0x7F.
EP_DEVICE std::uint8_t float_to_e4m3(float value) {
  if (value != value) return 0x7f;
  const std::uint32_t sign = detail::float_bits(value) >> 24 & 0x80, magnitude = detail::float_bits(value) & 0x7fffffff;
  const int exponent = static_cast<int>(magnitude >> 23) - 127;
  std::uint32_t rounded;
  if (exponent >= -6) {  // a normal e4m3: three bits of mantissa stay, the exponent moves from bias 127 to bias 7
    rounded = detail::round_off(magnitude - ((127u - 7u) << 23), 20);
  } else if (exponent >= -10) {  // a subnormal one: the significand counts steps of 2^-9
    const std::uint32_t significand = (magnitude & 0x7fffff) | 0x800000;
    rounded = detail::round_off(significand, 23 - 9 - exponent);
  } else {
    rounded = 0;
  }
  return static_cast<std::uint8_t>(sign | (rounded > 0x7e ? 0x7e : rounded));
}

}  // namespace deep_ep::device
