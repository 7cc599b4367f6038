// Who am I: blocks, warps and threads are one-dimensional. Nothing here orders memory.
// Functions without a body live in the engine (deep_ep/machine/engine).
#pragma once

#include <deep_ep/device/sim/language.cuh>

namespace deep_ep::device {

int block_idx();
int num_blocks();
int thread_idx();
int num_threads();
int warp_idx();
int num_warps();
int lane_idx();

// True in one lane of the warp, drawn per seed, the same lane at every call. All 32 lanes call it together.
bool elect(sim::Site site = sim::Site::current());

namespace detail {
// Reports an offset outside the block's shared memory.
std::byte* shared_memory_at(int byte_offset, const sim::Site& site);
}  // namespace detail

// Dynamic shared memory from `byte_offset` on. It starts at a multiple of 128 bytes and holds garbage at first.
template <class T>
EP_DEVICE T* shared_memory(int byte_offset = 0, sim::Site site = sim::Site::current()) {
  return reinterpret_cast<T*>(detail::shared_memory_at(byte_offset, site));
}

}  // namespace deep_ep::device
