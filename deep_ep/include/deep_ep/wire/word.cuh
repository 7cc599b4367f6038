#pragma once
// A word that proves its own age: value and epoch travel in one 8-byte store, so whoever reads the awaited epoch has
// the value too. No flag, no fence and no second trip.

#include <deep_ep/device/device.cuh>

namespace deep_ep {

EP_DEVICE uint64_t word(uint32_t value, uint32_t epoch) { return uint64_t(epoch) << 32 | value; }

// Waits until `source` holds a word of `epoch` and returns true with its value, or false after a timeout.
EP_DEVICE bool await_word(const uint64_t* source, uint32_t epoch, const device::Patience& patience, uint32_t phase,
                          int peer, int& value) {
  return device::wait_until_equals(patience, {.phase = phase, .peer = peer, .expected = epoch}, [&] {
    const uint64_t seen = device::load_relaxed_sys(source);
    value = static_cast<int>(static_cast<uint32_t>(seen));
    return static_cast<uint32_t>(seen >> 32);
  });
}

// The same for several words at once, of which `at(j)` is the j-th and `peer(j)` writes it. All are looked at together,
// again and again: one after the other, each would take a trip to memory of its own.
template <int kWords, class At, class Peer>
EP_DEVICE bool await_words(int count, At at, Peer peer, uint32_t epoch, const device::Patience& patience,
                           uint32_t phase, int (&values)[kWords]) {
  device::Waiting waiting{.phase = phase, .peer = peer(0), .expected = epoch};
  return device::wait_until_equals(patience, waiting, [&] {
    uint64_t seen[kWords];
    for (int j = 0; j < kWords; ++j) seen[j] = j < count ? device::load_relaxed_sys(at(j)) : word(0, epoch);
    uint32_t found = epoch;
    for (int j = 0; j < kWords; ++j) {
      values[j] = static_cast<int>(static_cast<uint32_t>(seen[j]));
      if (static_cast<uint32_t>(seen[j] >> 32) == epoch) continue;
      found = static_cast<uint32_t>(seen[j] >> 32);
      waiting.peer = peer(j);  // whom a record of this wait is to name
    }
    return found;
  });
}

}  // namespace deep_ep
