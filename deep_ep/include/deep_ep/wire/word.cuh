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

}  // namespace deep_ep
