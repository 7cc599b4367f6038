#pragma once
// In place of count, look_back, publish and collect when a handle of an earlier dispatch knows where everything goes.
//
// reads         the handle's counts
// writes        tables.row_base, .expert_total; of .expert_row, where each local expert's rows start
// waits for     nothing
// leaves behind (after the block has synchronised) the final row of everything that will arrive

#include <deep_ep/phases/report.cuh>
#include <deep_ep/phases/tables.cuh>
#include <deep_ep/wire/window.cuh>

namespace deep_ep {

EP_DEVICE void recall(const Window& window, int experts_per_rank, const Counts& known, const Tables& tables) {
  const int thread = device::thread_idx(), num_threads = device::num_threads();
  if (thread <= window.num_ranks) tables.row_base[thread] = thread == 0 ? 0 : known.per_rank[thread - 1];
  EP_NO_UNROLL
  for (int e = thread; e < experts_per_rank; e += num_threads) {
    tables.expert_total[e] = known.per_expert[e];
    tables.expert_row[e] = known.per_expert_end[e] - known.per_expert[e];
  }
}

}  // namespace deep_ep
