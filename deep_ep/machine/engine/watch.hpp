// Who sleeps until which word changes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "model.hpp"

namespace deep_ep::sim {

// The running fiber's poll looked at this word, or at anything else that has an address and is notified of.
void watch(const void* address);

// Sleeps until one of the watched words is notified of; false if the deadline passed instead.
bool sleep_until_notified(const Wait& wait);

// Something in these bytes changed: whoever watches them polls again.
void notify(const void* address, std::size_t num_bytes);

// Wakes all who watch anything. Returns whether anyone did.
bool notify_all();

// The sleeping fiber's deadline has passed.
void expire(Fiber& fiber);

void forget_watches();

}  // namespace deep_ep::sim
