// Talk among the 32 lanes of a warp. All lanes call at the same place of the source.
// Only sync_warp orders memory; the others move values between registers and promise nothing about memory.
#pragma once

#include <deep_ep/device/sm90/language.cuh>
#include <deep_ep/device/sm90/thread.cuh>

namespace deep_ep::device {

inline constexpr std::uint32_t kAllLanes = 0xffffffffu;

// What any lane wrote before, to shared or global memory, every lane sees after.
EP_DEVICE void sync_warp() { __syncwarp(kAllLanes); }

// Bit i is lane i's predicate.
EP_DEVICE std::uint32_t ballot(bool predicate) { return __ballot_sync(kAllLanes, predicate); }
EP_DEVICE bool any(bool predicate) { return __any_sync(kAllLanes, predicate) != 0; }
EP_DEVICE bool all(bool predicate) { return __all_sync(kAllLanes, predicate) != 0; }

// The value that `lane` passed; T of 4 or 8 bytes. Lanes may ask for different lanes.
template <class T>
EP_DEVICE T shuffle(T value, int lane) {
  return __builtin_bit_cast(T, __shfl_sync(kAllLanes, __builtin_bit_cast(detail::Word<T>, value), lane));
}

// The lanes that passed the same bits as this one; T of 4 or 8 bytes.
template <class T>
EP_DEVICE std::uint32_t match_any(T value) {
  return __match_any_sync(kAllLanes, __builtin_bit_cast(detail::Word<T>, value));
}

// The sum, or the largest, of all 32 values, in every lane.
EP_DEVICE int reduce_add(int value) { return __reduce_add_sync(kAllLanes, value); }
EP_DEVICE int reduce_max(int value) { return __reduce_max_sync(kAllLanes, value); }

// The mask of the lanes before this one.
EP_DEVICE std::uint32_t lanes_below() {
  std::uint32_t mask;
  asm("mov.u32 %0, %%lanemask_lt;" : "=r"(mask));
  return mask;
}

// How many bits (lanes) a mask holds.
EP_DEVICE int popcount(std::uint32_t mask) { return __popc(mask); }

// The sum over this lane and all lanes before it.
EP_DEVICE int inclusive_sum(int value) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int sum_below = __shfl_up_sync(kAllLanes, value, distance);
    if (lane_idx() >= distance) value += sum_below;
  }
  return value;
}

}  // namespace deep_ep::device
