#pragma once
// Tells every rank which tokens come, and what is to be known of each beside its row. A warp goes through its share of
// the tokens, 32 at a time, while others send the rows.
//
// reads         topk_idx, weights; the counts of what came before the share, or a handle's slots
// writes        slots; labels and routed words at all ranks, this one included
// waits for     nothing (the warp that asks has been admitted, and all agree)
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

// How many bits the numbers below `end` have.
EP_DEVICE int num_bits_below(int end) { return end > 1 ? highest_bit(end - 1) + 1 : 0; }

// The lanes that passed the same number as this one, of `num_bits` bits or -1. match_any would look at one value after
// the other, and most are different; this looks at one bit after the other.
EP_DEVICE uint32_t lanes_with(int number, int num_bits) {
  const uint32_t given = device::ballot(number >= 0);
  uint32_t same = number >= 0 ? given : ~given;
  EP_NO_UNROLL
  for (int first = 0; first < num_bits; first += 4) {
    for (int bit = first; bit < first + 4; ++bit) {  // above num_bits all given numbers are alike
      const bool is_set = number >> bit & 1;
      const uint32_t set = device::ballot(is_set);
      same &= is_set ? set : ~set;
    }
  }
  return same;
}

// Counts a number of `num_bits` bits (or -1: none) of every lane in. Returns how many were equal to this lane's: those
// that had been counted before, and those of the lanes below. Collective over the warp, whose counts they are.
EP_DEVICE int count_in(int* counts, int number, int num_bits) {
  const uint32_t same = lanes_with(number, num_bits);
  const int before = number >= 0 ? counts[number] : 0;
  device::sync_warp();
  if (number >= 0 && same >> device::lane_idx() == 1) counts[number] = before + device::popcount(same);
  device::sync_warp();
  return before + device::popcount(same & device::lanes_below());
}

// What a lane has of tokens that stand abreast.
struct Routed {
  int64_t entry = -1;  // of topk_idx; -1: none
  int expert = -1, slot = -1;
  float weight = 0.0f;
};

// Of as many steps as memory is asked for at once.
struct RoutedSteps {
  Routed at[kStepsAhead];

  // The next one becomes the first: a loop over them is much less code than a step for each, which takes longer to
  // fetch than to run.
  EP_DEVICE void turn() {
    for (int step = 1; step < kStepsAhead; ++step) at[step - 1] = at[step];
  }
};

// From token `begin` on; only tokens before `end`.
template <PlacesFrom kFrom>
EP_DEVICE RoutedSteps load_routed(const Router& router, const Abreast& abreast, int begin, int end) {
  RoutedSteps steps;
  for (int step = 0; step < kStepsAhead; ++step) {
    Routed& routed = steps.at[step];
    routed.entry = abreast.entry(begin + step * abreast.tokens, end);
    if (routed.entry < 0) continue;
    routed.expert = router.routing.expert(routed.entry);
    if (router.weights != nullptr) routed.weight = router.weights[routed.entry];
    if constexpr (kFrom == PlacesFrom::kHandle) routed.slot = router.slots[routed.entry];
  }
  return steps;
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

// Tells all ranks of the tokens that stand abreast from `first` on. `begin`: of the 32 tokens at hand.
template <PlacesFrom kFrom>
EP_DEVICE void route_step(const Router& router, uint32_t epoch, const Abreast& abreast, int begin, int first,
                          Routed routed) {
  const WarpCounts& counts = router.counts;
  const int warp = router.warp;
  const Selection selection = abreast.select(router.routing, routed.expert);
  int position = 0;  // a handle knows the rows
  if constexpr (kFrom == PlacesFrom::kSelections) {
    position = count_in(counts.experts(warp), routed.expert, num_bits_below(counts.num_experts));
    if (routed.expert >= 0) position += router.tables.expert_below[routed.expert];
    int slot =
        count_in(counts.ranks(warp), selection.speaks ? selection.rank : -1, num_bits_below(router.window.num_ranks));
    if (selection.speaks) slot += router.tables.rank_below[selection.rank];
    slot = abreast.hear(selection, slot);
    routed.slot = routed.expert >= 0 ? slot : -1;
    if (routed.entry >= 0) router.slots[routed.entry] = routed.slot;
  }
  if (selection.speaks) counts.slot(warp, selection.rank, first + abreast.j - begin) = routed.slot;
  label_tokens(router, epoch, abreast, first, routed, selection.rank, position);
}

template <PlacesFrom kFrom>
EP_DEVICE void route(const Router& router, uint32_t epoch, Range share) {
  const Window& window = router.window;
  const WarpCounts& counts = router.counts;
  const Abreast abreast(router.routing.num_topk);
  const int lane = device::lane_idx(), warp = router.warp;
  // Of 32 tokens, each lane has the words of one in the end.
  int end = min_of(share.begin + 32, share.end);
  EP_NO_UNROLL
  for (int begin = share.begin; begin < share.end; begin = end, end = min_of(end + 32, share.end)) {
    EP_NO_UNROLL
    for (int rank = 0; rank < window.num_ranks; ++rank) counts.slot(warp, rank, lane) = -1;
    device::sync_warp();
    EP_NO_UNROLL
    for (int first = begin; first < end; first += kStepsAhead * abreast.tokens) {
      RoutedSteps loaded = load_routed<kFrom>(router, abreast, first, end);
      const int last = min_of(first + kStepsAhead * abreast.tokens, end);
      EP_NO_UNROLL
      for (int at = first; at < last; at += abreast.tokens) {
        route_step<kFrom>(router, epoch, abreast, begin, at, loaded.at[0]);
        loaded.turn();
      }
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

}  // namespace deep_ep
