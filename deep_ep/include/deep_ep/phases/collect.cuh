#pragma once
// reads         the messages of all sources
// writes        tables.row_base, .expert_row, .coming; .ok if one never came
// waits for     the messages
// leaves behind (after the block has synchronised) the final row of everything that will arrive

#include <deep_ep/phases/tables.cuh>
#include <deep_ep/wire/integers.cuh>
#include <deep_ep/wire/message.cuh>
#include <deep_ep/wire/phase.cuh>
#include <deep_ep/wire/window.cuh>
#include <deep_ep/wire/word.cuh>

namespace deep_ep {

// Collective over one warp of the block.
EP_DEVICE void collect(const Window& window, uint32_t epoch, int experts_per_rank, int alignment,
                       const device::Patience& patience, const Tables& tables) {
  constexpr int kTogether = 8;  // looks that are under way at once
  const int lane = device::lane_idx();

  // Of each source, its tokens and then its counts.
  const int num_words = 1 + experts_per_rank, num_items = window.num_ranks * num_words;
  int from = 0, index = lane;  // of the word at hand
  const auto turn = [&](int words) {
    EP_NO_UNROLL
    for (index += words; index >= num_words; index -= num_words) ++from;
  };
  turn(0);
  EP_NO_UNROLL
  for (int first = lane; first < num_items; first += 32 * kTogether) {
    const int count = (num_items - first + 31) / 32;
    const uint64_t* words[kTogether];
    int* places[kTogether];
    int sources[kTogether], values[kTogether];
    for (int j = 0; j < kTogether; ++j) {
      const int word = index == 0 ? message_word::kTokens : message_word::kExperts + index - 1;
      words[j] = message(window, window.rank, from) + word;
      places[j] = index == 0 ? tables.row_base + from + 1 : tables.expert_row + from * experts_per_rank + index - 1;
      sources[j] = from;
      turn(32);
    }
    const auto at = [&](int j) { return words[j]; };
    const auto source = [&](int j) { return sources[j]; };
    const bool all_came = await_words(count, at, source, epoch, patience, phase::kCollect, values);
    if (!all_came) tables.take_back(Ok::kLearns);
    for (int j = 0; j < kTogether && j < count; ++j) *places[j] = all_came ? values[j] : 0;
  }
  device::sync_warp();

  // Sums over sources: rows of the plain layout; then, expert by expert, of the expanded one.
  const int rows = device::inclusive_sum(lane < window.num_ranks ? tables.row_base[lane + 1] : 0);
  if (lane == 0) tables.row_base[0] = 0;
  if (lane < window.num_ranks) tables.row_base[lane + 1] = rows;
  int start = 0;
  EP_NO_UNROLL
  for (int first = 0; first < experts_per_rank; first += 32) {
    const int expert = first + lane;
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
    if (expert < experts_per_rank) tables.coming[expert] = count;
  }
}

}  // namespace deep_ep
