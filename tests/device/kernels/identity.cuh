// Ten words of each thread: who it is.
#pragma once

#include "probe.cuh"

namespace deep_ep {

template <ProbeConfig C>
EP_DEVICE void identity(const ProbeArgs& args) {
  uint32_t* out = args.output + global_thread_idx() * 10;
  out[0] = device::block_idx();
  out[1] = device::num_blocks();
  out[2] = device::thread_idx();
  out[3] = device::num_threads();
  out[4] = device::warp_idx();
  out[5] = device::num_warps();
  out[6] = device::lane_idx();
  const bool elected = device::elect(), again = device::elect();
  out[7] = elected;
  out[8] = elected == again;
  const auto first = reinterpret_cast<uint64_t>(device::shared_memory<char>());
  out[9] = first % 128 == 0 && reinterpret_cast<uint64_t>(device::shared_memory<int>(256)) == first + 256;
}

}  // namespace deep_ep
