#pragma once
// reads         the partial counts of the blocks of one team
// writes        this block's partial counts; tables.*_below and .*_total, and .ok if one never came
// waits for     the counts of the other blocks
// leaves behind (after the block has synchronised) what the team's blocks before this one counted, and what all did

#include <deep_ep/phases/tables.cuh>
#include <deep_ep/wire/blocks.cuh>
#include <deep_ep/wire/phase.cuh>
#include <deep_ep/wire/window.cuh>
#include <deep_ep/wire/word.cuh>

namespace deep_ep {

EP_DEVICE void share_counts(const Window& window, uint32_t epoch, int num_experts, const Tables& tables) {
  uint64_t* mine = partials(window, device::block_idx());
  EP_NO_UNROLL
  for (int i = device::thread_idx(); i < num_experts + window.num_ranks; i += num_counting_threads()) {
    const int count = i < num_experts ? tables.expert_below[i] : tables.rank_below[i - num_experts];
    device::store_relaxed_gpu(mine + i, word(count, epoch));
  }
}

// Adds up word `i` of the team's blocks; false when one never came.
EP_DEVICE bool add_up(const Window& window, uint32_t epoch, const Blocks& team, int i, const device::Patience& patience,
                      int& below, int& total) {
  constexpr int kTogether = 8;  // loads under way at once
  below = total = 0;
  EP_NO_UNROLL
  for (int first = team.first; first < team.end(); first += kTogether) {
    int counts[kTogether];
    const auto at = [&](int j) { return partials(window, first + j) + i; };
    const auto peer = [&](int) { return window.rank; };
    if (!await_words(team.end() - first, at, peer, epoch, patience, phase::kLookBack, counts)) return false;
    for (int j = 0; j < kTogether; ++j) {
      if (first + j < device::block_idx()) below += counts[j];
      total += counts[j];
    }
  }
  return true;
}

// What look_back does for a team of one block, which needs to ask nobody.
EP_DEVICE void look_at_own(int num_experts, const Tables& tables) {
  EP_NO_UNROLL
  for (int i = device::thread_idx(); i < num_experts + kMaxRanks; i += num_counting_threads()) {
    int& below = (i < num_experts ? tables.expert_below + i : tables.rank_below + i - num_experts)[0];
    (i < num_experts ? tables.expert_total + i : tables.rank_total + i - num_experts)[0] = below;
    below = 0;
  }
}

EP_DEVICE void look_back(const Window& window, uint32_t epoch, const Blocks& team, int num_experts,
                         const device::Patience& patience, const Tables& tables) {
  EP_NO_UNROLL
  for (int i = device::thread_idx(); i < num_experts + window.num_ranks; i += num_counting_threads()) {
    int below, total;
    if (!add_up(window, epoch, team, i, patience, below, total)) tables.take_back(Ok::kCounts);
    (i < num_experts ? tables.expert_below + i : tables.rank_below + i - num_experts)[0] = below;
    (i < num_experts ? tables.expert_total + i : tables.rank_total + i - num_experts)[0] = total;
  }
}

}  // namespace deep_ep
