// Who am I: blocks, warps and threads are one-dimensional. Nothing here orders memory.
#pragma once

#include <deep_ep/device/sm90/language.cuh>

namespace deep_ep::device {

EP_DEVICE int block_idx() { return static_cast<int>(blockIdx.x); }
EP_DEVICE int num_blocks() { return static_cast<int>(gridDim.x); }
EP_DEVICE int thread_idx() { return static_cast<int>(threadIdx.x); }
EP_DEVICE int num_threads() { return static_cast<int>(blockDim.x); }
EP_DEVICE int num_warps() { return num_threads() / 32; }

// The shuffle tells the compiler that all lanes hold the same value, so that branches on it are uniform.
EP_DEVICE int warp_idx() { return __shfl_sync(~0u, thread_idx() / 32, 0); }

EP_DEVICE int lane_idx() {
  int lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// True in one lane of the warp, the same lane at every call. All 32 lanes call it together.
EP_DEVICE bool elect() {
  std::uint32_t is_elected;
  asm volatile(
      "{\n"
      "  .reg .pred elected;\n"
      "  elect.sync _|elected, 0xffffffff;\n"
      "  selp.u32 %0, 1, 0, elected;\n"
      "}"
      : "=r"(is_elected));
  return is_elected != 0;
}

// Dynamic shared memory from `byte_offset` on. It starts at a multiple of 128 bytes and holds garbage at first.
template <class T>
EP_DEVICE T* shared_memory(int byte_offset = 0) {
  extern __shared__ __align__(128) unsigned char deep_ep_shared_memory[];
  return reinterpret_cast<T*>(deep_ep_shared_memory + byte_offset);
}

}  // namespace deep_ep::device
