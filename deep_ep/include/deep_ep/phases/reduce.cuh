#pragma once
// reads         own rows of x, staged records of the peers or their rows in place, biases
// writes        combined_x, combined_weights
// waits for     the arrival mark of every token of this rank, from each rank that it went to; nothing in place
// leaves behind every token's sum
//
// The arithmetic is part of the interface: float32, starting from +0, biases first, one rounding to bfloat16 at the
// end. What comes home whole (a row or a sum a rank) is added in the order in which each rank's last selected expert
// appears among the token's selections; what comes row by row in the order of the selections.
//
// Rows go through registers, straight from where they lie: the many loads that a warp has under way, and the many warps
// of a block, hide what memory takes.

#include <deep_ep/phases/claims.cuh>
#include <deep_ep/phases/in_place.cuh>
#include <deep_ep/phases/results.cuh>
#include <deep_ep/phases/sum.cuh>
#include <deep_ep/wire/integers.cuh>
#include <deep_ep/wire/phase.cuh>
#include <deep_ep/wire/routing.cuh>
#include <deep_ep/wire/window.cuh>

namespace deep_ep {

struct Combined {
  char* x;                 // [num_tokens, row_bytes]
  int64_t stride;          // bytes
  float* weights;          // [num_tokens, num_topk] or null
  const char* bias[2];     // [num_tokens, row_bytes] or null; the first is there if the second is
  int64_t bias_stride[2];  // bytes
};

// What a token's sum is made of: the rows to which some lanes point, in the order of the lanes. In the place of lane
// `sum`, if any, stands the rounded sum of this rank's own rows.
struct Parts {
  uint32_t lanes, own, sum;
  const char* row_of_lane;
};

template <int kRows, int kTogether>
EP_DEVICE void add_columns(const Combined& out, int token, const Parts& parts, const Columns<kTogether>& at) {
  Rounded<kTogether> own;
  if (parts.sum != 0) {
    Sum<kTogether> sum;
    sum.template add_lanes<kRows>(parts.own, parts.row_of_lane, at);
    own = sum.rounded();
  }
  Sum<kTogether> sum;
  const auto bias = [&](int i) { return at.of(out.bias[i] + token * out.bias_stride[i]); };
  if (out.bias[0] != nullptr) sum.add(bias(0));
  if (out.bias[1] != nullptr) sum.add(bias(1));
  sum.template add_lanes<kRows>(parts.lanes & (parts.sum - 1), parts.row_of_lane,
                                at);  // all of them, if there is no own sum
  if (parts.sum != 0) {
    sum.add(own);
    sum.template add_lanes<kRows>(parts.lanes & ~(2 * parts.sum - 1), parts.row_of_lane, at);
  }
  if (at.mine()) sum.rounded().stream(at.of(out.x + token * out.stride));
}

// What a warp takes at a time, by the number of its claim: a token. Of the last tokens it takes a part, as much as a
// warp loads at once: a whole row takes several trips to memory, one after the other, and other warps have nothing to
// do then.
struct Jobs {
  int num_tokens, row_bytes;
  int whole, parts, part_bytes;  // tokens that are taken whole; of the others, the parts of each

  EP_DEVICE static Jobs of(int num_tokens, int row_bytes, int part_bytes) {
    const int num_warps = device::num_blocks() * device::num_threads() / 32;
    const int parts = (row_bytes + part_bytes - 1) / part_bytes, shared = (num_warps + parts - 1) / parts;
    const bool few = num_tokens <= 3 * shared;
    return {num_tokens, row_bytes, few ? 0 : num_tokens - shared, parts, part_bytes};
  }

  EP_DEVICE bool is_whole(int job) const { return job < whole; }
  EP_DEVICE int end() const { return whole + (num_tokens - whole) * parts; }
  EP_DEVICE int token(int job) const { return is_whole(job) ? job : whole + (job - whole) / parts; }
  EP_DEVICE int first_byte(int job) const { return is_whole(job) ? 0 : (job - whole) % parts * part_bytes; }
  EP_DEVICE int last_byte(int job) const {
    return is_whole(job) ? row_bytes : min_of(first_byte(job) + part_bytes, row_bytes);
  }
};

// `found`: lane r's, where the rows of this rank's tokens are at rank r; in place only.
template <Return kReturn>
EP_DEVICE void reduce(const Window& window, uint32_t epoch, const device::Patience& patience, const Routing& routing,
                      const int32_t* slots, const Results& results, const Found& found, const Combined& out) {
  constexpr bool kInPlace = kReturn == Return::kInPlace;
  constexpr Grasp kAtOnce = kGrasp<kReturn>;
  const Record& record = results.record;
  const int lane = device::lane_idx(), num_topk = routing.num_topk;
  const int own_tokens = results.by_owner.begin(window.rank);
  const Jobs jobs = Jobs::of(routing.num_tokens, record.row_bytes, kAtOnce.vectors * kStride);
  Claims claims(window, Queue::kReceive);
  const auto own_row_of = [&](const Choice& choice) {
    const bool own = choice.expert >= 0 && routing.rank_of(choice.expert) == window.rank;
    return own ? results.row_of_lane<kReturn>(own_tokens + choice.slot) : -1;
  };
  int ahead = claims.take();
  Choice next = load_choice(routing, slots, jobs.token(ahead));
  [[maybe_unused]] int next_own_row = -1;  // of expanded rows: it takes a load of its own
  if constexpr (!kIsPlain<kReturn>) next_own_row = own_row_of(next);
  EP_NO_UNROLL
  while (ahead < jobs.end()) {
    const int job = ahead, token = jobs.token(job);
    const Choice choice = next;
    ahead = claims.take();
    next = load_choice(routing, slots, jobs.token(ahead));
    const Selection selection = select(routing, choice.expert);
    const bool chosen = selection.rank >= 0, own = selection.rank == window.rank;
    const int received = own_tokens + choice.slot;
    const int own_row = kIsPlain<kReturn> ? (own ? received : -1) : next_own_row;
    // They come while the mark is looked at. Not where single rows are added: there the engine that would fetch them
    // serves senders.
    if constexpr (kReturn == Return::kSum) prefetch(results, own_row, jobs.first_byte(job), jobs.last_byte(job));

    bool came = true;
    if (!kInPlace && selection.speaks && !own) {
      const uint32_t* mark = arrived(window, window.rank, selection.rank, choice.slot);
      came = device::wait_until_equals(patience, {.phase = phase::kReduce, .peer = selection.rank, .expected = epoch},
                                       [&] { return device::load_acquire_sys(mark); });
    }
    if (!device::all(came)) return;
    device::sync_warp();  // one lane has acquired for all

    // Each selection's weight comes from the rank of its expert. It is stored last, so nobody waits for it.
    const char* row = nullptr;
    float weight = 0.0f;
    [[maybe_unused]] Found there_found;
    if constexpr (kInPlace) there_found = of_lane(found, chosen ? selection.rank : 0);
    if (own) {
      row = results.row(own_row);
      weight = results.weight_of_lane<kReturn>(received, own_row);
    } else if (chosen && kInPlace) {
      row = there_found.rows + int64_t(choice.slot) * record.row_bytes;
      const float* weights = reinterpret_cast<const float*>(there_found.beside) + int64_t(choice.slot) * num_topk;
      if (out.weights != nullptr) weight = weights[lane];
    } else if (chosen) {
      constexpr bool kOwnRecord = kReturn == Return::kEveryRow;
      row = kOwnRecord ? returned(window, window.rank, int64_t(token) * num_topk + lane, record.bytes())
                       : staged(window, window.rank, selection.rank, choice.slot, routing.max_tokens, record.bytes());
      const float* tail = reinterpret_cast<const float*>(row + record.row_bytes);
      if (out.weights != nullptr) weight = tail[kOwnRecord ? 0 : lane];
    }
    const bool there = own_row >= 0 || (chosen && !own);  // own rows may be lost (land.cuh)
    Parts parts{device::ballot(there && (kReturn == Return::kEveryRow || selection.speaks)), 0, 0, row};
    if constexpr (kReturn == Return::kSum) {
      parts.own = device::ballot(own && there);
      parts.sum = device::ballot(own && selection.speaks);
    }
    if constexpr (!kIsPlain<kReturn>) next_own_row = own_row_of(next);
    for_columns<kAtOnce.vectors>(jobs.first_byte(job), jobs.last_byte(job),
                                 [&](const auto& at) { add_columns<kAtOnce.rows>(out, token, parts, at); });
    if (out.weights != nullptr && lane < num_topk && jobs.first_byte(job) == 0)
      out.weights[int64_t(token) * num_topk + lane] = weight;
  }
}

}  // namespace deep_ep
