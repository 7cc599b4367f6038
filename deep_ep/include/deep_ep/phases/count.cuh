#pragma once
// Order by construction: every token's place follows from the tokens before it, never from who came first. Each warp
// counts a share of the block's range; sums over the warps, and then over the blocks (look_back.cuh), say what the
// tokens before each share took.
//
// reads         topk_idx of the block's range
// writes        the warps' counts; tables.expert_below and .rank_below: the block's own totals
// waits for     nothing
// leaves behind (after the block has synchronised) the counts of every warp

#include <deep_ep/phases/tables.cuh>
#include <deep_ep/wire/routing.cuh>

namespace deep_ep {

// What each warp counted, in shared memory that the rings use afterwards: [warp][num_experts + kMaxRanks], and
// [warp][kMaxRanks][32] for the slots of the 32 tokens at hand (route.cuh). plan.py reserves the same.
struct WarpCounts {
  int* words;
  int num_experts;

  EP_DEVICE int stride() const { return num_experts + kMaxRanks + kMaxRanks * 32; }
  EP_DEVICE int& expert(int warp, int e) const { return words[warp * stride() + e]; }
  EP_DEVICE int& rank(int warp, int r) const { return words[warp * stride() + num_experts + r]; }
  EP_DEVICE int& slot(int warp, int r, int token) const {
    return words[warp * stride() + num_experts + kMaxRanks + r * 32 + token];
  }
};

// Selections of each expert, 32 at a time.
EP_DEVICE void count_selections(const Routing& routing, int warp, Range share, const WarpCounts& counts) {
  const int lane = device::lane_idx();
  EP_NO_UNROLL
  for (int e = lane; e < routing.num_experts; e += 32) counts.expert(warp, e) = 0;
  device::sync_warp();

  const int64_t end = int64_t(share.end) * routing.num_topk;
  int64_t entry = int64_t(share.begin) * routing.num_topk + lane;
  int next = entry < end ? routing.expert(entry) : -1;
  EP_NO_UNROLL
  for (int64_t first = entry - lane; first < end; first += 32, entry += 32) {
    const int expert = next;
    next = entry + 32 < end ? routing.expert(entry + 32) : -1;  // on its way while these are counted
    const uint32_t same = device::match_any(expert);
    if (expert >= 0 && same >> lane == 1) counts.expert(warp, expert) += device::popcount(same);
    device::sync_warp();
  }
}

// Tokens bound for each rank, 32 at a time; lane r keeps rank r's count.
EP_DEVICE void count_tokens(const Routing& routing, int warp, Range share, int num_ranks, const WarpCounts& counts) {
  const int lane = device::lane_idx();
  int count = 0;
  EP_NO_UNROLL
  for (int token = share.begin + lane; token - lane < share.end; token += 32) {
    const uint32_t ranks = token < share.end ? ranks_of(routing, token) : 0;
    EP_NO_UNROLL
    for (int rank = 0; rank < num_ranks; ++rank) {
      const uint32_t bound = device::ballot(ranks >> rank & 1);
      if (lane == rank) count += device::popcount(bound);
    }
  }
  counts.rank(warp, lane) = count;
}

// The warps' counts become what the warps before each one counted; the block's own totals go to the tables.
EP_DEVICE void sum_over_warps(int num_warps, int num_experts, const WarpCounts& counts, const Tables& tables) {
  EP_NO_UNROLL
  for (int i = device::thread_idx(); i < num_experts + kMaxRanks; i += device::num_threads()) {
    int total = 0;
    EP_NO_UNROLL
    for (int warp = 0; warp < num_warps; ++warp) {
      int& count = counts.expert(warp, i);  // ranks follow experts
      const int own = count;
      count = total;
      total += own;
    }
    (i < num_experts ? tables.expert_below + i : tables.rank_below + i - num_experts)[0] = total;
  }
}

}  // namespace deep_ep
