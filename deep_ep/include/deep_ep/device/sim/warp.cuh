// Talk among the 32 lanes of a warp. All lanes call at the same place of the source, else the engine reports both
// places. Only sync_warp orders memory; the others move values and promise nothing about memory.
#pragma once

#include <deep_ep/device/sim/thread.cuh>

namespace deep_ep::device {

inline constexpr std::uint32_t kAllLanes = 0xffffffffu;

// What any lane wrote before, to shared or global memory, every lane sees after.
void sync_warp(sim::Site site = sim::Site::current());

// Bit i is lane i's predicate.
std::uint32_t ballot(bool predicate, sim::Site site = sim::Site::current());
bool any(bool predicate, sim::Site site = sim::Site::current());
bool all(bool predicate, sim::Site site = sim::Site::current());

namespace detail {
std::uint64_t shuffle_bits(std::uint64_t bits, int lane, const sim::Site& site);
std::uint32_t match_bits(std::uint64_t bits, const sim::Site& site);
}  // namespace detail

// The value that `lane` passed; T of 4 or 8 bytes. Lanes may ask for different lanes.
template <class T>
EP_DEVICE T shuffle(T value, int lane, sim::Site site = sim::Site::current()) {
  const std::uint64_t bits = detail::shuffle_bits(__builtin_bit_cast(detail::Word<T>, value), lane, site);
  return __builtin_bit_cast(T, static_cast<detail::Word<T>>(bits));
}

// The lanes that passed the same bits as this one; T of 4 or 8 bytes.
template <class T>
EP_DEVICE std::uint32_t match_any(T value, sim::Site site = sim::Site::current()) {
  return detail::match_bits(__builtin_bit_cast(detail::Word<T>, value), site);
}

// The sum, or the largest, of all 32 values, in every lane.
int reduce_add(int value, sim::Site site = sim::Site::current());
int reduce_max(int value, sim::Site site = sim::Site::current());

// The sum over this lane and all lanes before it.
int inclusive_sum(int value, sim::Site site = sim::Site::current());

// The mask of the lanes before this one.
EP_DEVICE std::uint32_t lanes_below() { return (1u << lane_idx()) - 1; }

// How many bits (lanes) a mask holds.
EP_DEVICE int popcount(std::uint32_t mask) { return __builtin_popcount(mask); }

}  // namespace deep_ep::device
