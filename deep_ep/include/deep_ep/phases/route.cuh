#pragma once
// Tells every rank which tokens come, and what is to be known of each beside its row. A warp goes through its share of
// the tokens, 32 at a time, while others send the rows.
//
// reads         topk_idx, weights; the counts of what came before the share, or a handle's slots
// writes        slots; labels and routed words at all ranks, this one included; a copy of topk_idx
// waits for     nothing (admit has let us in)
// leaves behind at each rank a whole label before its routed word, which is to be acquired

#include <deep_ep/phases/count.cuh>
#include <deep_ep/wire/integers.cuh>
#include <deep_ep/wire/window.cuh>
#include <deep_ep/wire/word.cuh>

namespace deep_ep {

enum class PlacesFrom { kSelections, kHandle };

// What a warp routes with.
struct Router {
  const Window& window;
  const Routing& routing;
  const Record& record;
  const float* weights;  // [num_tokens, num_topk] or null
  int32_t* slots;        // [num_tokens, num_topk]
  const WarpCounts& counts;
  const Tables& tables;
  int warp;

  // Labels of a few tokens: lane j * num_topk + k has selection k of token j, any other lane a token behind the range.
  // Counts on in counts.expert.
  template <PlacesFrom kFrom>
  EP_DEVICE void label_tokens(Range range, int j, int k) const {
    const int lane = device::lane_idx(), num_topk = routing.num_topk, token = range.begin + j;
    const int64_t entry = int64_t(token) * num_topk + k;
    const bool mine = token < range.end;
    const int expert = mine ? routing.expert(entry) : -1;
    const float weight = mine && weights != nullptr ? weights[entry] : 0.0f;
    int position = -1;
    if constexpr (kFrom == PlacesFrom::kSelections) {
      const uint32_t same = device::match_any(expert);
      const int before = expert >= 0 ? counts.expert(warp, expert) : 0;
      device::sync_warp();
      if (expert >= 0) position = tables.expert_below[expert] + before + device::popcount(same & device::lanes_below());
      if (expert >= 0 && same >> lane == 1) counts.expert(warp, expert) = before + device::popcount(same);
      device::sync_warp();
    }
    const int rank_of_lane = expert >= 0 ? routing.rank_of(expert) : -1;
    const uint32_t lanes_of_token = (num_topk == 32 ? ~0u : (1u << num_topk) - 1) << (lane - k);
    EP_NO_UNROLL
    for (int rank = 0; rank < window.num_ranks; ++rank) {
      const uint32_t bound = device::ballot(rank_of_lane == rank);
      if (!mine || (bound & lanes_of_token) == 0) continue;
      const Label said = label(window, rank, window.rank, token, routing.max_tokens, num_topk, record);
      said.expert(k) = expert;
      said.position(k) = position;
      said.weight(k) = weight;
    }
  }

  // counts.slot becomes the slot of each of 32 tokens, a lane each, at every rank; -1 where it does not go. Lane r
  // counts on what goes to rank r.
  EP_DEVICE void find_slots(int token, int end, int& count_of_rank) const {
    const int lane = device::lane_idx();
    const uint32_t ranks = token < end ? ranks_of(routing, token) : 0;
    EP_NO_UNROLL
    for (int rank = 0; rank < window.num_ranks; ++rank) {
      const uint32_t bound = device::ballot(ranks >> rank & 1);
      const int slot = device::shuffle(count_of_rank, rank) + device::popcount(bound & device::lanes_below());
      counts.slot(warp, rank, lane) = ranks >> rank & 1 ? slot : -1;
      if (lane == rank) count_of_rank += device::popcount(bound);
    }
    device::sync_warp();
    const int64_t first = int64_t(token - lane) * routing.num_topk;
    const int num_entries = min_of(32, end - (token - lane)) * routing.num_topk;
    EP_NO_UNROLL
    for (int i = lane; i < num_entries; i += 32) {
      const int expert = routing.expert(first + i);
      slots[first + i] = expert >= 0 ? counts.slot(warp, routing.rank_of(expert), i / routing.num_topk) : -1;
    }
  }

  // The same from the slots of a handle.
  EP_DEVICE void recall_slots(int token, int end) const {
    const int lane = device::lane_idx();
    EP_NO_UNROLL
    for (int rank = 0; rank < window.num_ranks; ++rank) counts.slot(warp, rank, lane) = -1;
    EP_NO_UNROLL
    for (int k = 0; token < end && k < routing.num_topk; ++k) {
      const int64_t entry = int64_t(token) * routing.num_topk + k;
      const int expert = routing.expert(entry);
      if (expert >= 0) counts.slot(warp, routing.rank_of(expert), lane) = slots[entry];
    }
  }
};

template <PlacesFrom kFrom>
EP_DEVICE void route(const Router& router, uint32_t epoch, Range share) {
  const int lane = device::lane_idx(), num_topk = router.routing.num_topk;
  const int together = 32 / num_topk, j = lane / num_topk, k = lane % num_topk;  // j may be `together`: a lane to spare
  const int num_ranks = router.window.num_ranks;
  int count_of_rank = 0;
  if constexpr (kFrom == PlacesFrom::kSelections) {
    count_of_rank = router.tables.rank_below[lane] + router.counts.rank(router.warp, lane);
  }
  EP_NO_UNROLL
  for (int first = share.begin; first < share.end; first += 32) {
    const int end = min_of(first + 32, share.end), token = first + lane;
    EP_NO_UNROLL
    for (int begin = first; begin < end; begin += together) {
      router.template label_tokens<kFrom>({begin, min_of(begin + together, end)}, j, k);
    }
    if constexpr (kFrom == PlacesFrom::kSelections) {
      router.find_slots(token, end, count_of_rank);
    } else {
      router.recall_slots(token, end);
    }
    device::sync_warp();
    device::fence_sys();  // the labels, which all lanes have written, come before the words
    EP_NO_UNROLL
    for (int rank = 0; token < end && rank < num_ranks; ++rank) {
      const int slot = router.counts.slot(router.warp, rank, lane);
      device::store_relaxed_sys(routed(router.window, rank, router.window.rank, token),
                                word(static_cast<uint32_t>(slot), epoch));
    }
    device::sync_warp();  // counts.slot is free again
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

}  // namespace deep_ep
