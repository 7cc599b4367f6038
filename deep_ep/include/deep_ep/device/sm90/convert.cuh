// bfloat16 and e4m3 (float8_e4m3fn) to and from float: exact, or round to nearest even. Subnormals and signed zeros
// are kept. docs/primitives.md lists the corner cases; the simulator gives the same bits.
#pragma once

#include <deep_ep/device/sm90/language.cuh>

namespace deep_ep::device {

struct Float2 {
  float x, y;
};

// A bfloat16 is the upper half of a float.
EP_DEVICE float bf16_to_float(std::uint16_t value) { return __uint_as_float(static_cast<std::uint32_t>(value) << 16); }

// x is the low half.
EP_DEVICE Float2 bf16x2_to_float2(std::uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

// Overflow gives infinity; any NaN gives 0x7FFF.
EP_DEVICE std::uint32_t float2_to_bf16x2(Float2 values) {
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(values.y), "f"(values.x));
  return pair;
}

// One of a pair: the instruction for pairs is the fast one.
EP_DEVICE std::uint16_t float_to_bf16(float value) {
  return static_cast<std::uint16_t>(float2_to_bf16x2({value, 0.0f}));
}

// Both NaNs (0x7F, 0xFF) give the positive quiet NaN 0x7FFFFFFF. The way leads through half precision, which holds
// every e4m3 exactly.
EP_DEVICE float e4m3_to_float(std::uint8_t value) {
  float result;
  asm("{\n"
      "  .reg .b32 halves;\n"
      "  .reg .b16 low, high;\n"
      "  cvt.rn.f16x2.e4m3x2 halves, %1;\n"
      "  mov.b32 {low, high}, halves;\n"
      "  cvt.f32.f16 %0, low;\n"
      "}"
      : "=f"(result)
      : "h"(static_cast<std::uint16_t>(value)));
  return result;
}

// Saturates: infinities and whatever rounds beyond 448 give 448 with their sign. Any NaN gives 0x7F.
EP_DEVICE std::uint8_t float_to_e4m3(float value) {
  std::uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(value));
  return static_cast<std::uint8_t>(pair & 0xff);
}

}  // namespace deep_ep::device
