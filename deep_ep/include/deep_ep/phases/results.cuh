#pragma once
// What combine is given: rows of x in either layout, whose tokens they belong to, and what of them goes home.

#include <deep_ep/phases/payload.cuh>
#include <deep_ep/phases/sum.cuh>
#include <deep_ep/wire/record.cuh>

namespace deep_ep {

// What of a token comes home from a rank that it went to.
enum class Return {
  kRow,       // plain layout: the rank's row
  kInPlace,   // the same, but nobody sends it: it is read where it lies
  kSum,       // expanded layout: the sum of the rank's rows, rounded
  kEveryRow,  // expanded layout: each of them, in a record of its own
};

template <Return kReturn>
constexpr bool kIsPlain = kReturn == Return::kRow || kReturn == Return::kInPlace;

// Many rows that lie far apart are added best in long pieces, one row after the other; few rows two at once. A peer's
// memory takes longest (docs/experiments.md, notes 20, 27 and 39).
template <Return kReturn>
constexpr Grasp kGrasp = kReturn == Return::kSum       ? Grasp{.vectors = 7, .rows = 1}
                         : kReturn == Return::kInPlace ? Grasp{.vectors = 7, .rows = 2}
                                                       : Grasp{.vectors = 4, .rows = 2};

// Rows of the plain layout by the rank that owns their tokens: inclusive sums over ranks.
struct RowsByOwner {
  const int32_t* per_rank;
  EP_DEVICE int begin(int rank) const { return rank == 0 ? 0 : per_rank[rank - 1]; }
  EP_DEVICE int count(int rank) const { return per_rank[rank] - begin(rank); }
};

// A received token has a number, its row of the plain layout; the expanded layout has a row for each of its local
// selections.
struct Results {
  Rows rows;                // of x, as dispatch returned them
  const float* weights;     // [received tokens, num_topk]; expanded: [rows]; or null
  const int32_t* metadata;  // [received tokens, num_topk + 2]; the expanded layout's alone is looked at
  RowsByOwner by_owner;
  Record record;  // in which they travel
  int32_t num_topk;

  // Lane k learns the row of selection k, or -1. In the plain layout all share one.
  template <Return kReturn>
  EP_DEVICE int row_of_lane(int received) const {
    if constexpr (kIsPlain<kReturn>) return received;
    const int k = device::lane_idx();
    return k < num_topk ? metadata[int64_t(received) * (num_topk + 2) + 2 + k] : -1;
  }

  // Lane k learns the weight of selection k, or 0.
  template <Return kReturn>
  EP_DEVICE float weight_of_lane(int received, int row_of_lane) const {
    const int k = device::lane_idx();
    if (weights == nullptr || k >= num_topk || row_of_lane < 0) return 0.0f;
    return kIsPlain<kReturn> ? weights[int64_t(received) * num_topk + k] : weights[row_of_lane];
  }

  // Which token it is, among those of all ranks.
  EP_DEVICE int token(int received) const { return metadata[int64_t(received) * (num_topk + 2)]; }

  EP_DEVICE const char* row(int index) const { return rows.x + index * rows.stride; }
};

// Bytes `begin` to `end` of the rows of x that lanes name (-1: none) will be added soon. A warp loads a row in many
// steps, one after the other, and what comes from the cache takes half the time.
EP_DEVICE void prefetch(const Results& results, int row_of_lane, int begin, int end) {
  if (row_of_lane >= 0) device::bulk_prefetch(results.row(row_of_lane) + begin, end - begin);
}

}  // namespace deep_ep
