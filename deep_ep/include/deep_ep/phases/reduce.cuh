#pragma once
// reads         own rows of x, staged records of the peers, biases
// writes        combined_x, combined_weights
// waits for     the arrival mark of every record that a token's sum needs
// leaves behind every token's sum
//
// The arithmetic is part of the interface: float32, biases first, then the ranks in the order in which each one's last
// selected expert appears among the token's selections, starting from +0, one rounding to bfloat16 at the end.
//
// Rows go through registers, straight from where they lie: the many loads that a warp has under way, and the many warps
// of a block, hide what memory takes.

#include <deep_ep/phases/compose.cuh>
#include <deep_ep/phases/push_rows.cuh>
#include <deep_ep/phases/sum.cuh>
#include <deep_ep/wire/integers.cuh>
#include <deep_ep/wire/phase.cuh>
#include <deep_ep/wire/record.cuh>
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

// Adds the rows of one token, which all have come: of each speaking lane the one at `row`.
template <int kTogether>
EP_DEVICE void add_columns(const Combined& out, int token, uint32_t speakers, const char* row, Columns<kTogether> at) {
  Sum<kTogether> sum;
  const auto bias = [&](int i) { return at.of(out.bias[i] + token * out.bias_stride[i]); };
  if (out.bias[1] != nullptr) {
    sum.add(bias(0), bias(1));
  } else if (out.bias[0] != nullptr) {
    sum.add(bias(0));
  }
  sum.add_lanes(speakers, row, at);
  if (at.mine()) sum.store(at.of(out.x + token * out.stride));
}

EP_DEVICE void reduce(const Window& window, uint32_t epoch, const device::Patience& patience, const Routing& routing,
                      const int32_t* slots, const Results& results, Share share, const Combined& out) {
  const int lane = device::lane_idx(), num_topk = routing.num_topk;
  const int own_rows = results.by_owner.begin(window.rank);
  const TokenTables tables{slots, nullptr, nullptr};
  Choice next = load_choice(routing, tables, share.first, routing.num_tokens);
  EP_NO_UNROLL
  for (int token = share.first; token < routing.num_tokens; token += share.step) {
    const Choice choice = next;
    next = load_choice(routing, tables, token + share.step, routing.num_tokens);
    const Selection selection = select(routing, choice.expert);

    bool came = true;
    if (selection.speaks && selection.rank != window.rank) {
      const uint32_t* mark = arrived(window, window.rank, selection.rank, choice.slot);
      came = device::wait_until_equals(patience, {.phase = phase::kReduce, .peer = selection.rank, .expected = epoch},
                                       [&] { return device::load_acquire_sys(mark); });
    }
    if (!device::all(came)) return;
    device::sync_warp();  // one lane has acquired for all

    // Each selection's weight comes from the rank of its expert. It is stored last, so nobody waits for it.
    const char* row = nullptr;
    float weight = 0.0f;
    if (selection.rank == window.rank) {
      const int64_t own_row = own_rows + choice.slot;
      row = results.rows.x + own_row * results.rows.stride;
      if (results.weights != nullptr) weight = results.weights[own_row * num_topk + lane];
    } else if (selection.rank >= 0) {
      row = staged(window, window.rank, selection.rank, choice.slot, routing.max_tokens, results.record.bytes());
      if (out.weights != nullptr) weight = reinterpret_cast<const float*>(row + results.record.row_bytes)[lane];
    }
    const uint32_t speakers = device::ballot(selection.speaks);
    for_columns(results.record.row_bytes, [&](auto columns) { add_columns(out, token, speakers, row, columns); });
    if (out.weights != nullptr && lane < num_topk) out.weights[int64_t(token) * num_topk + lane] = weight;
  }
}

}  // namespace deep_ep
