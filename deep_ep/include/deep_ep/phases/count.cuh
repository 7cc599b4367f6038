#pragma once
// Order by construction: every token's place follows from the tokens before it, never from who came first. Each warp
// counts a share of the block's range, by atomics, since a sum has no order; sums over the warps, and then over the
// blocks (look_back.cuh), say what the tokens before each share took.
//
// reads         topk_idx of the block's range
// writes        the warps' counts; tables.expert_below and .rank_below: the block's own totals; a copy of topk_idx
// waits for     nothing
// leaves behind (after the block has synchronised) the counts of every warp

#include <deep_ep/phases/tables.cuh>
#include <deep_ep/wire/blocks.cuh>
#include <deep_ep/wire/routing.cuh>

namespace deep_ep {

// What each warp counted, in shared memory that the rings use afterwards: [warp][num_experts + kMaxRanks], and
// [warp][kMaxRanks][32] for the slots of the 32 tokens at hand (route.cuh). plan.py reserves the same.
struct WarpCounts {
  int* words;
  int num_experts;

  EP_DEVICE int stride() const { return num_experts + kMaxRanks + kMaxRanks * 32; }
  EP_DEVICE int* experts(int warp) const { return words + warp * stride(); }
  EP_DEVICE int* ranks(int warp) const { return experts(warp) + num_experts; }
  EP_DEVICE int& slot(int warp, int rank, int token) const { return ranks(warp)[kMaxRanks + rank * 32 + token]; }
};

// Steps of a warp through its share for which memory is asked at once: it takes far longer than to count.
constexpr int kStepsAhead = 4;

// Selections of each expert, and tokens bound for each rank. `kept_idx`: null, or where a copy of topk_idx goes, for
// the handle: a launch of its own would cost more.
EP_DEVICE void count_share(const Routing& routing, int warp, Range share, const WarpCounts& counts, void* kept_idx) {
  EP_NO_UNROLL
  for (int i = device::lane_idx(); i < counts.num_experts + kMaxRanks; i += 32) counts.experts(warp)[i] = 0;
  device::sync_warp();
  const Abreast abreast(routing.num_topk);
  EP_NO_UNROLL
  for (int begin = share.begin; begin < share.end; begin += kStepsAhead * abreast.tokens) {
    int experts[kStepsAhead];
    for (int step = 0; step < kStepsAhead; ++step) {
      const int64_t entry = abreast.entry(begin + step * abreast.tokens, share.end);
      experts[step] = entry >= 0 ? routing.expert(entry) : -1;
    }
    const int last = min_of(begin + kStepsAhead * abreast.tokens, share.end);
    EP_NO_UNROLL
    for (int first = begin; first < last; first += abreast.tokens) {
      const int64_t entry = abreast.entry(first, share.end);
      if (kept_idx != nullptr && entry >= 0) routing.copy(entry, kept_idx);
      const Selection selection = abreast.select(routing, experts[0]);
      if (experts[0] >= 0) device::fetch_add_shared(counts.experts(warp) + experts[0], 1);
      if (selection.speaks) device::fetch_add_shared(counts.ranks(warp) + selection.rank, 1);
      for (int step = 1; step < kStepsAhead; ++step) experts[step - 1] = experts[step];
    }
  }
}

// The warps' counts become what the warps before each one counted; the block's own totals go to the tables.
EP_DEVICE void sum_over_warps(int num_warps, int num_experts, const WarpCounts& counts, const Tables& tables) {
  EP_NO_UNROLL
  for (int i = device::thread_idx(); i < num_experts + kMaxRanks; i += num_counting_threads()) {
    constexpr int kTogether = 4;  // warps whose counts are asked for at once
    int total = 0;
    EP_NO_UNROLL
    for (int first = 0; first < num_warps; first += kTogether) {
      int own[kTogether];
      for (int j = 0; j < kTogether; ++j) own[j] = first + j < num_warps ? counts.experts(first + j)[i] : 0;
      for (int j = 0; j < kTogether && first + j < num_warps; ++j) {
        counts.experts(first + j)[i] = total;  // ranks follow experts
        total += own[j];
      }
    }
    (i < num_experts ? tables.expert_below + i : tables.rank_below + i - num_experts)[0] = total;
  }
}

}  // namespace deep_ep
