#pragma once
// Order by construction: every token's place follows from the tokens before it, never from who came first. Each warp
// counts a share of the block's range from zero; sums over the warps, and later over the blocks (look_back.cuh), make
// the places absolute.
//
// reads         topk_idx of the block's range
// writes        positions and slots of the range, counted from the start of each warp's share; the warps' counts
// waits for     nothing
// leaves behind (after the block has synchronised) the counts of every warp

#include <deep_ep/phases/tables.cuh>
#include <deep_ep/wire/blocks.cuh>
#include <deep_ep/wire/integers.cuh>
#include <deep_ep/wire/phase.cuh>
#include <deep_ep/wire/routing.cuh>
#include <deep_ep/wire/window.cuh>

namespace deep_ep {

// What each warp counted, in shared memory that the rings use afterwards: [warp][num_experts + kMaxRanks], and while it
// counts, [warp][kMaxRanks][32] for the slots of the 32 tokens at hand. plan.py reserves the same.
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

// positions[token, k] = earlier selections of the same expert in the share. 32 selections at a time, in order.
EP_DEVICE void place_in_experts(const Routing& routing, int warp, Range share, int* positions,
                                const WarpCounts& counts) {
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
    next = entry + 32 < end ? routing.expert(entry + 32) : -1;  // on its way while these are placed
    const uint32_t same = device::match_any(expert);
    const int before = expert >= 0 ? counts.expert(warp, expert) : 0;
    device::sync_warp();
    if (entry < end) positions[entry] = expert >= 0 ? before + device::popcount(same & device::lanes_below()) : -1;
    if (expert >= 0 && same >> lane == 1) counts.expert(warp, expert) = before + device::popcount(same);
    device::sync_warp();
  }
}

// slots[token, k] = earlier tokens of the share bound for the rank of selection k. 32 tokens at a time; lane r keeps
// rank r's count.
EP_DEVICE void place_in_ranks(const Routing& routing, int warp, Range share, int num_ranks, int* slots,
                              const WarpCounts& counts) {
  constexpr int kTogether = 4;  // loads of a lane that are under way at once
  const int lane = device::lane_idx();
  int count = 0;
  EP_NO_UNROLL
  for (int first = share.begin; first < share.end; first += 32) {
    const int64_t entry = int64_t(first + lane) * routing.num_topk;
    const int num_topk = first + lane < share.end ? routing.num_topk : 0;
    uint32_t ranks = 0;
    EP_NO_UNROLL
    for (int begin = 0; begin < num_topk; begin += kTogether) {
      int experts[kTogether];
      for (int k = 0; k < kTogether; ++k) experts[k] = begin + k < num_topk ? routing.expert(entry + begin + k) : -1;
      for (int k = 0; k < kTogether; ++k) {
        if (experts[k] >= 0) ranks |= 1u << routing.rank_of(experts[k]);
      }
    }
    EP_NO_UNROLL
    for (int rank = 0; rank < num_ranks; ++rank) {
      const uint32_t bound = device::ballot(ranks >> rank & 1);
      counts.slot(warp, rank, lane) = device::shuffle(count, rank) + device::popcount(bound & device::lanes_below());
      if (lane == rank) count += device::popcount(bound);
    }
    device::sync_warp();
    const int end = min_of(32, share.end - first) * routing.num_topk;
    EP_NO_UNROLL
    for (int i = lane; i < end; i += 32) {
      const int64_t at = int64_t(first) * routing.num_topk + i;
      const int expert = routing.expert(at);
      slots[at] = expert >= 0 ? counts.slot(warp, routing.rank_of(expert), i / routing.num_topk) : -1;
    }
    device::sync_warp();
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

// Places in the share become places among all tokens of this rank.
EP_DEVICE void settle(const Routing& routing, int warp, Range share, int* slots, int* positions,
                      const WarpCounts& counts, const Tables& tables) {
  constexpr int kTogether = 4;  // entries of a lane that are under way at once
  const int64_t end = int64_t(share.end) * routing.num_topk;
  EP_NO_UNROLL
  for (int64_t first = int64_t(share.begin) * routing.num_topk + device::lane_idx(); first < end;
       first += 32 * kTogether) {
    int experts[kTogether], slot[kTogether], position[kTogether];
    for (int j = 0; j < kTogether; ++j) {
      const int64_t entry = first + 32 * j;
      experts[j] = entry < end ? routing.expert(entry) : -1;
      if (experts[j] < 0) continue;
      slot[j] = slots[entry];
      position[j] = positions[entry];
    }
    for (int j = 0; j < kTogether; ++j) {
      if (experts[j] < 0) continue;
      const int rank = routing.rank_of(experts[j]);
      slots[first + 32 * j] = slot[j] + tables.rank_below[rank] + counts.rank(warp, rank);
      positions[first + 32 * j] = position[j] + tables.expert_below[experts[j]] + counts.expert(warp, experts[j]);
    }
  }
}

// Copies topk_idx of the block's range, for the handle: a launch of its own would cost more.
EP_DEVICE void keep_selections(const Routing& routing, Range range, void* to) {
  const int64_t end = int64_t(range.end) * routing.num_topk;
  for (int64_t entry = int64_t(range.begin) * routing.num_topk + device::thread_idx(); entry < end;
       entry += device::num_threads()) {
    if (routing.index_bytes == 8) {
      static_cast<int64_t*>(to)[entry] = static_cast<const int64_t*>(routing.topk_idx)[entry];
    } else {
      static_cast<int32_t*>(to)[entry] = static_cast<const int32_t*>(routing.topk_idx)[entry];
    }
  }
}

// Tells the team's other blocks that this block's tokens have their places. Collective over the block, which has
// synchronised.
EP_DEVICE void tell_settled(const Window& window, uint32_t epoch) {
  if (device::thread_idx() == 0) device::store_release_gpu(partials(window, device::block_idx()) + kSettledWord, epoch);
}

// Waits until all blocks of the team have settled theirs: then any warp may use any token's. Collective over the warp;
// false when one never came.
EP_DEVICE bool await_settled(const Window& window, uint32_t epoch, const Blocks& team,
                             const device::Patience& patience) {
  bool all_came = true;
  EP_NO_UNROLL
  for (int block = team.first + device::lane_idx(); all_came && block < team.end(); block += 32) {
    const uint64_t* word = partials(window, block) + kSettledWord;
    all_came = device::wait_until_equals(patience, {.phase = phase::kSettle, .peer = window.rank, .expected = epoch},
                                         [&] { return static_cast<uint32_t>(device::load_acquire_gpu(word)); });
  }
  all_came = device::all(all_came);
  device::sync_warp();
  return all_came;
}

}  // namespace deep_ep
