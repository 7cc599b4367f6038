#pragma once
// What is to be known beside a row goes where it belongs, by warps that do nothing else: it is many small stores, which
// would hold up those who move rows.
//
// reads         routed and label words; a handle's metadata
// writes        recv_topk_idx, recv_topk_weights, recv_src_metadata
// waits for     the words
// leaves behind everything about a received token but its row and scale factors

#include <deep_ep/phases/payload.cuh>
#include <deep_ep/phases/ring.cuh>
#include <deep_ep/phases/tables.cuh>
#include <deep_ep/wire/blocks.cuh>
#include <deep_ep/wire/integers.cuh>
#include <deep_ep/wire/phase.cuh>
#include <deep_ep/wire/record.cuh>
#include <deep_ep/wire/routing.cuh>
#include <deep_ep/wire/window.cuh>
#include <deep_ep/wire/word.cuh>

namespace deep_ep {

enum class Layout : int32_t { kPlain, kExpanded };
enum class Padding : int32_t { kLeave, kZero };

// `any` rows are `rows` in the plain layout, `expanded_rows` in the expanded one.
struct Received {
  char* x;                        // [any, row_bytes]
  int64_t stride;                 // bytes
  void* topk_idx;                 // [rows, num_topk], as wide as the sender's indices; null in the expanded layout
  float* weights;                 // [rows, num_topk], or [expanded_rows] in the expanded layout; or null
  int32_t* metadata;              // [rows, num_topk + 2], or null if a handle has it
  const int32_t* known_metadata;  // a handle's, or null
  Scales scales;                  // [any, count]
  int32_t rows;                   // tokens that there is room for
  int32_t expanded_rows;          // rows of the expanded layout that there is, or would be, room for
  Layout layout;
  Padding padding;  // of the expanded layout
};

// What a warp copies out of, and into what.
struct Landing {
  const Window& window;
  const Routing& routing;
  const Rows& rows;      // this rank's own
  const Scales& scales;  // likewise
  const Record& record;
  const Tables& tables;
  const Received& out;
  const uint32_t epoch;
  const device::Patience& patience;
};

// Where label word `which` of selection k lies.
EP_DEVICE const uint64_t* label_word(const Landing& landing, int source, int token, int k, int which) {
  const Routing& routing = landing.routing;
  return label(landing.window, landing.window.rank, source, token, k, routing.max_tokens, routing.num_topk) + which;
}

// The value of a word that `seen` may hold already; false if it never came.
EP_DEVICE bool resolve(const Landing& landing, const uint64_t* at, uint64_t seen, int source, uint32_t& value) {
  int came = static_cast<int>(static_cast<uint32_t>(seen));
  const bool is_there = static_cast<uint32_t>(seen >> 32) == landing.epoch ||
                        await_word(at, landing.epoch, landing.patience, phase::kLabel, source, came);
  value = static_cast<uint32_t>(came);
  return is_there;
}

// The row of selection k in the expanded layout, or -1. `row`: of the token in the plain one.
EP_DEVICE int find_row(const Landing& landing, int source, int row, int k, Place place) {
  const Routing& routing = landing.routing;
  const Received& out = landing.out;
  int expanded = -1;
  if (out.known_metadata != nullptr) {
    expanded = out.known_metadata[int64_t(row) * (routing.num_topk + 2) + 2 + k];
  } else if (place.expert >= 0 && place.position != Place::kLost &&
             routing.rank_of(place.expert) == landing.window.rank) {
    const int local = place.expert - landing.window.rank * routing.experts_per_rank;
    expanded = landing.tables.expert_row[source * routing.experts_per_rank + local] + place.position;
  }
  return expanded < out.expanded_rows ? expanded : -1;  // more than the worst case: some token names an expert twice
}

// A lane's selection of a token that may come here.
struct Expected {
  int source, token, k;                      // token -1: none
  uint64_t slot = 0, place = 0, weight = 0;  // words, at a first look

  EP_DEVICE void look(const Landing& landing) {
    if (token < 0) return;
    slot = device::load_relaxed_sys(routed(landing.window, landing.window.rank, source, token));
    place = device::load_relaxed_sys(label_word(landing, source, token, k, 0));
    weight = device::load_relaxed_sys(label_word(landing, source, token, k, 1));
  }
};

// Puts what is said of each lane's selection where it belongs; `lanes` are those of the lane's token. False if some
// word never came. Collective over the warp.
EP_DEVICE bool land_selections(const Landing& landing, const Expected& seen, uint32_t lanes) {
  const Routing& routing = landing.routing;
  const Received& out = landing.out;
  const int k = seen.k, num_topk = routing.num_topk, rank = landing.window.rank;
  uint32_t slot = ~0u, packed = Place::kNone, weight = 0;
  bool came = true;
  if (seen.token >= 0) {
    came = resolve(landing, routed(landing.window, rank, seen.source, seen.token), seen.slot, seen.source, slot);
  }
  const bool comes = came && slot != ~0u;
  if (comes) {
    came = resolve(landing, label_word(landing, seen.source, seen.token, k, 0), seen.place, seen.source, packed) &&
           resolve(landing, label_word(landing, seen.source, seen.token, k, 1), seen.weight, seen.source, weight);
  }
  if (!device::all(came)) return false;

  const Place place = Place::unpack(packed);
  const bool here = place.expert >= 0 && routing.rank_of(place.expert) == rank;
  const uint32_t chosen = device::ballot(here) & lanes;
  if (!comes) return true;
  const int row = landing.tables.row_base[seen.source] + static_cast<int>(slot);
  const bool plain = out.layout == Layout::kPlain;
  // Where a handle knows the rows, only the weights of expanded ones go there.
  const int expanded = out.metadata != nullptr || !plain ? find_row(landing, seen.source, row, k, place) : -1;
  if (out.metadata != nullptr) {
    int32_t* metadata = out.metadata + int64_t(row) * (num_topk + 2);
    if (k == 0) {
      metadata[0] = seen.source * routing.max_tokens + seen.token;
      metadata[1] = seen.source * num_topk + highest_bit(chosen) - lowest_bit(lanes);
    }
    metadata[2 + k] = expanded;
  }
  const int64_t entry = plain ? int64_t(row) * num_topk + k : expanded;
  if (out.weights != nullptr && entry >= 0) out.weights[entry] = __builtin_bit_cast(float, weight);
  if (!plain) return true;
  const int local = here ? place.expert - rank * routing.experts_per_rank : -1;
  if (routing.index_bytes == 8) {
    static_cast<int64_t*>(out.topk_idx)[entry] = local;
  } else {
    static_cast<int32_t*>(out.topk_idx)[entry] = local;
  }
  return true;
}

// All tokens of all sources, as many side by side as a warp holds: the first ones of every source, then the next ones,
// ...
EP_DEVICE void land(const Landing& landing, const Team& team) {
  const Abreast abreast(landing.routing.num_topk);
  const int num_ranks = landing.window.num_ranks, lane = device::lane_idx();
  const int most = device::reduce_max(lane < num_ranks ? landing.tables.tokens_of[lane] : 0);
  const int items = (most + abreast.tokens - 1) / abreast.tokens * num_ranks;
  const auto expect = [&](int item) {
    const int source = item % num_ranks, token = item / num_ranks * abreast.tokens + abreast.j;
    const bool is_one = item < items && abreast.j < abreast.tokens && token < landing.tables.tokens_of[source];
    Expected expected{source, is_one ? token : -1, abreast.k};
    expected.look(landing);
    return expected;
  };
  Expected next = expect(team.own);
  EP_NO_UNROLL
  for (int item = team.own; item < items; item += team.count) {
    const Expected seen = next;
    next = expect(item + team.count);  // its words are on their way while these are landed
    if (!land_selections(landing, seen, abreast.lanes())) return;
  }
}

}  // namespace deep_ep
