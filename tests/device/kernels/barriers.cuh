// In every round each thread writes a word, meets the others of its group, and reads the word of another thread of the
// group; what the group is, is the variant.
#pragma once

#include "probe.cuh"

namespace deep_ep {

enum Group { kWarp, kNamed, kBlock, kGrid, kCluster, kArrive };

template <ProbeConfig C>
EP_DEVICE void meet(device::GridBarrier* grid) {
  namespace d = device;
  if constexpr (C.variant == kWarp) d::sync_warp();
  if constexpr (C.variant == kNamed) d::sync_named(1 + d::warp_idx() / 2, 64);
  if constexpr (C.variant == kBlock) d::sync_block();
  if constexpr (C.variant == kGrid) d::sync_grid(grid);
  if constexpr (C.variant == kCluster) d::sync_cluster();
}

template <ProbeConfig C>
EP_DEVICE void barriers(const ProbeArgs& args) {
  namespace d = device;
  auto* grid = reinterpret_cast<d::GridBarrier*>(args.window);
  auto* words = reinterpret_cast<uint32_t*>(args.window + 128);
  const int threads = d::num_threads(), i = global_thread_idx();
  const int group = C.variant == kWarp      ? 32
                    : C.variant == kNamed   ? 64
                    : C.variant == kBlock   ? threads
                    : C.variant == kCluster ? threads * d::cluster_num_blocks()
                                            : threads * d::num_blocks();
  for (int round = 0; round < args.count; ++round) {
    uint32_t* out = args.output + round * threads * d::num_blocks();
    if constexpr (C.variant == kArrive) {  // odd warps bring words and go on; even warps wait for them
      const bool is_producer = d::warp_idx() % 2 != 0;
      const int full = 1 + d::warp_idx() / 2, empty = 8 + d::warp_idx() / 2;
      if (is_producer) {
        if (round > 0) d::sync_named(empty, 64);
        words[i] = args.input[i] + round;
        d::arrive_named(full, 64);
        out[i] = 0;
      } else {
        d::sync_named(full, 64);
        out[i] = words[i + 32];
        if (round + 1 < args.count) d::arrive_named(empty, 64);
      }
    } else {
      words[i] = args.input[i] + round;
      meet<C>(grid);
      const int first = i / group * group;
      out[i] = words[first + (i - first + 33 + round) % group];
      meet<C>(grid);
    }
  }
}

}  // namespace deep_ep
