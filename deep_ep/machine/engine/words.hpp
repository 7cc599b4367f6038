// See words.cpp; the rest of its interface is device/sim/memory.cuh.
#pragma once

namespace deep_ep::sim {

void forget_words();

// A recycled fiber is now another thread.
void forget_fences(const Fiber& fiber);

}  // namespace deep_ep::sim
