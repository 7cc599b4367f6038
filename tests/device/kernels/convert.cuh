// Conversions of input words: variant 0 float to both small types, 1 bfloat16 to float, 2 e4m3 to float, 3 pairs.
#pragma once

#include "probe.cuh"

namespace deep_ep {

template <ProbeConfig C>
EP_DEVICE void convert(const ProbeArgs& args) {
  namespace d = device;
  for (int i = global_thread_idx(); i < args.count; i += d::num_blocks() * d::num_threads()) {
    const uint32_t bits = args.input[i];
    const float value = __builtin_bit_cast(float, bits);
    uint32_t result = 0;
    if constexpr (C.variant == 0) {
      result = d::float_to_bf16(value) | static_cast<uint32_t>(d::float_to_e4m3(value)) << 16;
    } else if constexpr (C.variant == 1) {
      result = __builtin_bit_cast(uint32_t, d::bf16_to_float(static_cast<uint16_t>(bits)));
    } else if constexpr (C.variant == 2) {
      result = __builtin_bit_cast(uint32_t, d::e4m3_to_float(static_cast<uint8_t>(bits)));
    } else {
      const d::Float2 pair = d::bf16x2_to_float2(bits);
      result = d::float2_to_bf16x2({pair.y, pair.x});  // swapped: the halves must not be mixed up
    }
    args.output[i] = result;
  }
}

}  // namespace deep_ep
