// See words.cpp; the rest of its interface is device/sim/memory.cuh.
#pragma once

namespace deep_ep::sim {

void forget_words();

}  // namespace deep_ep::sim
