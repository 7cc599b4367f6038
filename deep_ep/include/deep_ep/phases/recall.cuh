#pragma once
// In place of count, look_back, publish and collect when a handle of an earlier dispatch knows where everything goes.
//
// reads         the handle's counts
// writes        tables.row_base, .coming; of .expert_row, where each local expert's rows start
// waits for     nothing
// leaves behind (after the block has synchronised) the final row of everything that will arrive

#include <deep_ep/phases/report.cuh>
#include <deep_ep/phases/tables.cuh>
#include <deep_ep/wire/window.cuh>

namespace deep_ep {

// Collective over one warp of the block.
EP_DEVICE void recall(const Window& window, int experts_per_rank, const Counts& known, const Tables& tables) {
  const int lane = device::lane_idx();
  if (lane == 0) tables.row_base[0] = 0;
  if (lane < window.num_ranks) tables.row_base[lane + 1] = known.per_rank[lane];
  EP_NO_UNROLL
  for (int e = lane; e < experts_per_rank; e += 32) {
    tables.coming[e] = known.per_expert[e];
    tables.expert_row[e] = known.per_expert_end[e] - known.per_expert[e];
  }
}

}  // namespace deep_ep
