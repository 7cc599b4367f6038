#pragma once
// Integer arithmetic that every phase needs.

#include <deep_ep/device/device.cuh>

namespace deep_ep {

EP_DEVICE int min_of(int a, int b) { return a < b ? a : b; }

EP_DEVICE int align_up(int value, int alignment) { return (value + alignment - 1) / alignment * alignment; }

// Positions of the lowest and the highest set bit of a mask that is not 0.
EP_DEVICE int lowest_bit(uint32_t mask) { return device::popcount((mask & -mask) - 1); }

EP_DEVICE int highest_bit(uint32_t mask) {
  for (int shift = 1; shift < 32; shift *= 2) mask |= mask >> shift;
  return device::popcount(mask) - 1;
}

}  // namespace deep_ep
