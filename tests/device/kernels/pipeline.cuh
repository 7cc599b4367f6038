// Warp 0 produces and the others consume, over one mbarrier that says "full" and one that says "empty", by ordinary
// stores to shared memory; arrivals without bytes order them.
#pragma once

#include "probe.cuh"

namespace deep_ep {

template <ProbeConfig C>
EP_DEVICE void pipeline(const ProbeArgs& args) {
  namespace d = device;
  auto* barriers = d::shared_memory<d::Mbarrier>();
  auto* words = d::shared_memory<uint32_t>(128);
  const int num_consumers = d::num_threads() - 32;
  if (d::thread_idx() == 0) {
    d::mbarrier_init(barriers[0], 32);
    d::mbarrier_init(barriers[1], num_consumers);
    d::fence_mbarrier_init();
  }
  d::sync_block();
  for (int round = 0; round < args.count; ++round) {
    const uint32_t parity = round % 2;
    if (d::warp_idx() == 0) {
      if (round > 0) d::mbarrier_wait(barriers[1], parity ^ 1);
      words[d::lane_idx()] = args.input[round * 32 + d::lane_idx()];
      d::mbarrier_arrive(barriers[0]);
    } else {
      d::mbarrier_wait(barriers[0], parity);
      const int consumer = d::block_idx() * num_consumers + d::thread_idx() - 32;
      args.output[round * d::num_blocks() * num_consumers + consumer] = words[consumer % 32] * 3;
      d::mbarrier_arrive(barriers[1]);
    }
  }
}

}  // namespace deep_ep
