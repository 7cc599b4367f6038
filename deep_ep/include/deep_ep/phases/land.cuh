#pragma once
// What comes with a row: its tail goes where it belongs, and says where the row goes in the expanded layout.
//
// reads         a token's tail in a stage; a handle's metadata
// writes        recv_topk_idx, recv_topk_weights, recv_src_metadata, scale factors
// waits for     nothing
// leaves behind everything about a received token but its row

#include <deep_ep/phases/compose.cuh>
#include <deep_ep/phases/tables.cuh>
#include <deep_ep/wire/integers.cuh>
#include <deep_ep/wire/record.cuh>
#include <deep_ep/wire/routing.cuh>
#include <deep_ep/wire/window.cuh>

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

// Lane k learns the row of selection k in the expanded layout, or -1; `local` is its expert here, or -1.
EP_DEVICE int find_row(const Routing& routing, const Tables& tables, const Received& out, int source, int row,
                       int local, int position) {
  const int k = device::lane_idx(), num_topk = routing.num_topk;
  int expanded = -1;
  if (out.known_metadata == nullptr) {
    if (local >= 0) expanded = tables.expert_row[source * routing.experts_per_rank + local] + position;
  } else if (k < num_topk && out.layout == Layout::kExpanded) {
    expanded = out.known_metadata[int64_t(row) * (num_topk + 2) + 2 + k];
  }
  return expanded < out.expanded_rows ? expanded : -1;  // more than the worst case: some token names an expert twice
}

// Scale factors go beside the token's row, or beside each of its expanded rows.
EP_DEVICE void land_scales(const RoutingTail& tail, const Received& out, int row, int row_of_selection) {
  if (out.scales.count == 0) return;
  const bool plain = out.layout == Layout::kPlain;
  EP_NO_UNROLL
  for (uint32_t left = plain ? 1u : device::ballot(row_of_selection >= 0); left != 0; left &= left - 1) {
    const int to = plain ? row : device::shuffle(row_of_selection, lowest_bit(left));
    EP_NO_UNROLL
    for (int i = device::lane_idx(); i < out.scales.count; i += 32) out.scales.at(to, i) = tail.scale(i);
  }
}

// Puts all that comes with plain row `row` where it belongs. Returns, to lane k, the row of selection k in the expanded
// layout, or -1.
EP_DEVICE int land_tail(const Window& window, const Routing& routing, const Tables& tables, const Received& out,
                        int source, int row, const char* at) {
  const RoutingTail tail{reinterpret_cast<int32_t*>(const_cast<char*>(at)), routing.num_topk};
  const int k = device::lane_idx(), num_topk = routing.num_topk, token = tail.token();
  const int expert = k < num_topk ? tail.expert(k) : -1, position = k < num_topk ? tail.position(k) : -1;
  const float weight = k < num_topk ? tail.weight(k) : 0.0f;
  const bool here = expert >= 0 && routing.rank_of(expert) == window.rank;
  const int local = here ? expert - window.rank * routing.experts_per_rank : -1;
  const int expanded = find_row(routing, tables, out, source, row, local, position);
  land_scales(tail, out, row, expanded);
  device::fence_async_proxy_shared();  // the tail has been read: its stage may be loaded again

  const uint32_t chosen = device::ballot(here);
  if (out.metadata != nullptr) {
    int32_t* metadata = out.metadata + int64_t(row) * (num_topk + 2);
    if (k == 0) {
      metadata[0] = source * routing.max_tokens + token;
      metadata[1] = source * num_topk + highest_bit(chosen);
    }
    if (k < num_topk) metadata[2 + k] = expanded;
  }
  if (k >= num_topk) return expanded;
  const bool plain = out.layout == Layout::kPlain;
  const int64_t entry = plain ? int64_t(row) * num_topk + k : expanded;
  if (out.weights != nullptr && entry >= 0) out.weights[entry] = weight;
  if (!plain) return expanded;
  if (routing.index_bytes == 8) {
    static_cast<int64_t*>(out.topk_idx)[entry] = local;
  } else {
    static_cast<int32_t*>(out.topk_idx)[entry] = local;
  }
  return expanded;
}

}  // namespace deep_ep
