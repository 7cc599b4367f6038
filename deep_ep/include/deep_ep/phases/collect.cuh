#pragma once
// reads         the messages of all sources
// writes        tables.row_base, .expert_row; .rank_total, .expert_total (of what comes now); .ok if one never came
// waits for     the messages
// leaves behind the final row of everything that will arrive

#include <deep_ep/phases/tables.cuh>
#include <deep_ep/wire/integers.cuh>
#include <deep_ep/wire/message.cuh>
#include <deep_ep/wire/phase.cuh>
#include <deep_ep/wire/window.cuh>
#include <deep_ep/wire/word.cuh>

namespace deep_ep {

EP_DEVICE void collect(const Window& window, uint32_t epoch, int experts_per_rank, int alignment,
                       const device::Patience& patience, const Tables& tables) {
  const int thread = device::thread_idx(), num_threads = device::num_threads();
  const auto await = [&](int source, int index, int& value) {
    const bool came =
        await_word(message(window, window.rank, source) + index, epoch, patience, phase::kCollect, source, value);
    if (!came) {
      device::store_relaxed_gpu(tables.ok, 0);
      value = 0;
    }
  };

  // Of each source, its tokens and then its counts.
  const int num_words = 1 + experts_per_rank;
  EP_NO_UNROLL
  for (int i = thread; i < window.num_ranks * num_words; i += num_threads) {
    const int source = i / num_words, expert = i % num_words - 1;
    int& place = expert < 0 ? tables.rank_total[source] : tables.expert_row[source * experts_per_rank + expert];
    await(source, expert < 0 ? message_word::kTokens : message_word::kExperts + expert, place);
  }
  device::sync_block();

  // Sums over sources: rows of the plain layout; then, expert by expert, of the expanded one.
  if (thread == 0) {
    int rows = 0;
    EP_NO_UNROLL
    for (int source = 0; source < window.num_ranks; ++source) {
      tables.row_base[source] = rows;
      rows += tables.rank_total[source];
    }
    tables.row_base[window.num_ranks] = rows;
  }
  if (thread < 32) {
    int start = 0;
    EP_NO_UNROLL
    for (int first = 0; first < experts_per_rank; first += 32) {
      const int expert = first + thread;
      int count = 0;
      EP_NO_UNROLL
      for (int source = 0; expert < experts_per_rank && source < window.num_ranks; ++source) {
        count += tables.expert_row[source * experts_per_rank + expert];
      }
      const int aligned = align_up(count, alignment);
      const int inclusive = device::inclusive_sum(aligned);
      int row = start + inclusive - aligned;
      EP_NO_UNROLL
      for (int source = 0; expert < experts_per_rank && source < window.num_ranks; ++source) {
        int& place = tables.expert_row[source * experts_per_rank + expert];
        const int from_here = place;
        place = row;
        row += from_here;
      }
      start += device::shuffle(inclusive, 31);
      if (expert < experts_per_rank) tables.expert_total[expert] = count;
    }
  }
  device::sync_block();
}

}  // namespace deep_ep
