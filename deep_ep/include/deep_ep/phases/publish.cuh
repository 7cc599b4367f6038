#pragma once
// reads         tables.*_below, .*_total
// writes        the messages at all ranks, this one included
// waits for     nothing (the warp that asks has been admitted, and all agree)
// leaves behind words; whoever reads one with this epoch has its value

#include <deep_ep/phases/tables.cuh>
#include <deep_ep/wire/blocks.cuh>
#include <deep_ep/wire/message.cuh>
#include <deep_ep/wire/window.cuh>
#include <deep_ep/wire/word.cuh>

namespace deep_ep {

EP_DEVICE void publish(const Window& window, uint32_t epoch, const Blocks& team, int experts_per_rank,
                       const Tables& tables) {
  const int thread = device::thread_idx();
  EP_NO_UNROLL
  for (int rank = team.own(); rank < window.num_ranks; rank += team.count) {
    uint64_t* to = message(window, rank, window.rank);
    EP_NO_UNROLL
    for (int i = thread; i < experts_per_rank; i += num_counting_threads()) {
      const int count = tables.expert_total[rank * experts_per_rank + i];
      device::store_relaxed_sys(to + message_word::kExperts + i, word(count, epoch));
    }
    if (thread == 0) device::store_relaxed_sys(to + message_word::kTokens, word(tables.rank_total[rank], epoch));
  }
}

}  // namespace deep_ep
