// Twelve words of each thread: what the warp's collectives give for input[thread].
#pragma once

#include "probe.cuh"

namespace deep_ep {

template <ProbeConfig C>
EP_DEVICE void warp(const ProbeArgs& args) {
  const uint32_t value = args.input[global_thread_idx()];
  const uint64_t wide = static_cast<uint64_t>(value % 5) << 40 | value % 3;
  const int lane = static_cast<int>(value % 32);
  uint32_t* out = args.output + global_thread_idx() * 12;
  out[0] = device::ballot(value % 2 != 0);
  out[1] = device::any(value % 64 == 0);
  out[2] = device::all(value % 64 != 0);
  out[3] = device::shuffle(value, lane);
  const auto from = device::shuffle(wide, lane);
  out[4] = static_cast<uint32_t>(from >> 32);
  out[5] = static_cast<uint32_t>(from);
  out[6] = device::match_any(value % 4);
  out[7] = device::match_any(wide);
  out[8] = device::reduce_add(static_cast<int>(value));
  out[9] = device::reduce_max(static_cast<int>(value));
  out[10] = device::inclusive_sum(static_cast<int>(value));
  out[11] = device::popcount(value & device::lanes_below());
}

}  // namespace deep_ep
