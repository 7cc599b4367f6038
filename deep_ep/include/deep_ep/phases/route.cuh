#pragma once
// Tells every rank which tokens come, and what is to be known of each beside its row. A warp goes through its share of
// the tokens, 32 at a time, while others send the rows.
//
// reads         topk_idx, weights; the counts of what came before the share, or a handle's slots
// writes        slots; labels and routed words at all ranks, this one included; a copy of topk_idx
// waits for     nothing (admit has let us in)
// leaves behind words; whoever reads one with this epoch has its value

#include <deep_ep/phases/count.cuh>
#include <deep_ep/wire/integers.cuh>
#include <deep_ep/wire/record.cuh>
#include <deep_ep/wire/window.cuh>
#include <deep_ep/wire/word.cuh>

namespace deep_ep {

enum class PlacesFrom { kSelections, kHandle };

// What a warp routes with.
struct Router {
  const Window& window;
  const Routing& routing;
  const float* weights;  // [num_tokens, num_topk] or null
  int32_t* slots;        // [num_tokens, num_topk]
  const WarpCounts& counts;
  const Tables& tables;
  int warp;
};

// What a lane has of tokens that stand abreast.
struct Routed {
  int64_t entry = -1;  // of topk_idx; -1: none
  int expert = -1, slot = -1;
  float weight = 0.0f;
};

template <PlacesFrom kFrom>
EP_DEVICE Routed load_routed(const Router& router, const Abreast& abreast, int first, int end) {
  Routed routed;
  routed.entry = abreast.entry(first, end);
  if (routed.entry < 0) return routed;
  routed.expert = router.routing.expert(routed.entry);
  if (router.weights != nullptr) routed.weight = router.weights[routed.entry];
  if constexpr (kFrom == PlacesFrom::kHandle) routed.slot = router.slots[routed.entry];
  return routed;
}

// Labels of the tokens that stand abreast from `first` on, at each rank that they go to.
EP_DEVICE void label_tokens(const Router& router, uint32_t epoch, const Abreast& abreast, int first,
                            const Routed& routed, int rank, int position) {
  const Window& window = router.window;
  const uint64_t place = word(Place{routed.expert, position}.packed(), epoch);
  const uint64_t weight = word(__builtin_bit_cast(uint32_t, routed.weight), epoch);
  EP_NO_UNROLL
  for (int to = 0; to < window.num_ranks; ++to) {
    const uint32_t bound = device::ballot(rank == to);
    if (routed.entry < 0 || (bound & abreast.lanes()) == 0) continue;
    uint64_t* said =
        label(window, to, window.rank, first + abreast.j, abreast.k, router.routing.max_tokens, abreast.num_topk);
    device::store_relaxed_sys(said, place);
    device::store_relaxed_sys(said + 1, weight);
  }
}

// `next`: what load_routed says of the first tokens.
template <PlacesFrom kFrom>
EP_DEVICE void route(const Router& router, uint32_t epoch, Range share, const Abreast& abreast, Routed next) {
  const Window& window = router.window;
  const WarpCounts& counts = router.counts;
  const int lane = device::lane_idx(), warp = router.warp;
  // Of 32 tokens, each lane has the words of one in the end.
  int end = min_of(share.begin + 32, share.end);
  EP_NO_UNROLL
  for (int begin = share.begin; begin < share.end; begin = end, end = min_of(end + 32, share.end)) {
    EP_NO_UNROLL
    for (int rank = 0; rank < window.num_ranks; ++rank) counts.slot(warp, rank, lane) = -1;
    device::sync_warp();
    EP_NO_UNROLL
    for (int first = begin; first < end; first += abreast.tokens) {
      Routed routed = next;
      const int ahead = first + abreast.tokens;  // on their way while these are told
      next = ahead < end ? load_routed<kFrom>(router, abreast, ahead, end)
                         : load_routed<kFrom>(router, abreast, end, min_of(end + 32, share.end));
      const Selection selection = abreast.select(router.routing, routed.expert);
      int position = 0;  // a handle knows the rows
      if constexpr (kFrom == PlacesFrom::kSelections) {
        position = count_in(counts.experts(warp), routed.expert);
        if (routed.expert >= 0) position += router.tables.expert_below[routed.expert];
        int slot = count_in(counts.ranks(warp), selection.speaks ? selection.rank : -1);
        if (selection.speaks) slot += router.tables.rank_below[selection.rank];
        slot = abreast.hear(selection, slot);
        routed.slot = routed.expert >= 0 ? slot : -1;
        if (routed.entry >= 0) router.slots[routed.entry] = routed.slot;
      }
      if (selection.speaks) counts.slot(warp, selection.rank, first + abreast.j - begin) = routed.slot;
      label_tokens(router, epoch, abreast, first, routed, selection.rank, position);
    }
    device::sync_warp();
    const int token = begin + lane;
    EP_NO_UNROLL
    for (int rank = 0; token < end && rank < window.num_ranks; ++rank) {
      const int slot = counts.slot(warp, rank, lane);
      device::store_relaxed_sys(deep_ep::routed(window, rank, window.rank, token),
                                word(static_cast<uint32_t>(slot), epoch));
    }
    device::sync_warp();  // counts.slot is free again
  }
}

// Copies topk_idx of the block's range, for the handle: a launch of its own would cost more.
EP_DEVICE void keep_selections(const Routing& routing, Range range, void* to) {
  const int64_t end = int64_t(range.end) * routing.num_topk;
  for (int64_t entry = int64_t(range.begin) * routing.num_topk + device::thread_idx(); entry < end;
       entry += num_counting_threads()) {
    if (routing.index_bytes == 8) {
      static_cast<int64_t*>(to)[entry] = static_cast<const int64_t*>(routing.topk_idx)[entry];
    } else {
      static_cast<int32_t*>(to)[entry] = static_cast<const int32_t*>(routing.topk_idx)[entry];
    }
  }
}

}  // namespace deep_ep
