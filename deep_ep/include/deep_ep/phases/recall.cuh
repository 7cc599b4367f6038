#pragma once
// In place of place, publish and collect when a handle of an earlier dispatch knows where everything goes.
//
// reads         the handle's counts
// writes        tables.row_base, .starts, .expert_total; of .expert_row, where each local expert's rows start
// waits for     nothing
// leaves behind (after the block has synchronised) the final row of everything that will arrive

#include <deep_ep/phases/report.cuh>
#include <deep_ep/phases/tables.cuh>
#include <deep_ep/wire/integers.cuh>
#include <deep_ep/wire/routing.cuh>

namespace deep_ep {

// Sources do not say how their blocks divide what they send. Equal parts among as many blocks as send here is a good
// guess, and only the order in which arrivals are looked for depends on it.
EP_DEVICE void recall(const Window& window, int experts_per_rank, int num_send_blocks, const Counts& known,
                      const Tables& tables) {
  const int thread = device::thread_idx(), num_threads = device::num_threads();
  const int senders = num_send_blocks > 0 ? num_send_blocks : 1;
  const auto rows_before = [&](int source) { return source == 0 ? 0 : known.per_rank[source - 1]; };

  EP_NO_UNROLL
  for (int source = thread; source <= window.num_ranks; source += num_threads) {
    tables.row_base[source] = rows_before(source);
  }
  EP_NO_UNROLL
  for (int i = thread; i < window.num_ranks * (kMaxBlocks + 1); i += num_threads) {
    const int source = i / (kMaxBlocks + 1), block = i % (kMaxBlocks + 1);
    const int tokens = rows_before(source + 1) - rows_before(source);
    tables.starts[i] = part_of({0, tokens}, min_of(block, senders), senders).begin;
  }
  EP_NO_UNROLL
  for (int e = thread; e < experts_per_rank; e += num_threads) {
    tables.expert_total[e] = known.per_expert[e];
    tables.expert_row[e] = known.per_expert_end[e] - known.per_expert[e];
  }
}

}  // namespace deep_ep
