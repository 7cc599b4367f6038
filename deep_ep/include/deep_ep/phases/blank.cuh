#pragma once
// What no token fills says so, whatever its memory held.
//
// reads         tables of a block that has collected
// writes        recv_topk_idx and recv_src_metadata past the last token; the padding rows of the expanded layout
// waits for     nothing
// leaves behind "no expert" and "no token", and zeros

#include <deep_ep/phases/land.cuh>
#include <deep_ep/wire/blocks.cuh>

namespace deep_ep {

// Rows past the real count have no expert, and come from nowhere.
EP_DEVICE void blank_unused(const Routing& routing, int used_rows, const Blocks& team, const Received& out) {
  const int thread = team.own() * device::num_threads() + device::thread_idx();
  const int num_threads = team.count * device::num_threads();
  const auto fill = [&](auto* entries, int columns) {
    const int64_t end = entries == nullptr ? 0 : int64_t(out.rows) * columns;
    EP_NO_UNROLL
    for (int64_t entry = int64_t(used_rows) * columns + thread; entry < end; entry += num_threads) entries[entry] = -1;
  };
  if (routing.index_bytes == 8) {
    fill(static_cast<int64_t*>(out.topk_idx), routing.num_topk);
  } else {
    fill(static_cast<int32_t*>(out.topk_idx), routing.num_topk);
  }
  fill(out.metadata, routing.num_topk + 2);
}

EP_DEVICE void zero_row(const Received& out, int row, int row_bytes) {
  const int lane = device::lane_idx();
  char* to = out.x + row * out.stride;
  EP_NO_UNROLL
  for (int at = lane * int(sizeof(device::Vector16)); at < row_bytes; at += 32 * int(sizeof(device::Vector16))) {
    *reinterpret_cast<device::Vector16*>(to + at) = {};
  }
  EP_NO_UNROLL
  for (int i = lane; i < out.scales.count; i += 32) out.scales.at(row, i) = 0;
  if (lane == 0 && out.weights != nullptr) out.weights[row] = 0.0f;
}

// Rows between an expert's last one and the next expert's first; the warps of the team take them in turn.
EP_DEVICE void zero_padding(int row_bytes, int experts_per_rank, int alignment, const Tables& tables, const Team& team,
                            const Received& out) {
  EP_NO_UNROLL
  for (int e = 0; e < experts_per_rank; ++e) {
    const int start = tables.expert_row[e], count = tables.coming[e];  // source 0's rows come first
    const int end = min_of(start + align_up(count, alignment), out.expanded_rows);
    EP_NO_UNROLL
    for (int row = start + count + team.own; row < end; row += team.count) zero_row(out, row, row_bytes);
  }
}

EP_DEVICE void blank(const Window& window, const Routing& routing, const Record& record, int alignment,
                     const Tables& tables, int warp, const Blocks& team, const Received& out) {
  blank_unused(routing, tables.row_base[window.num_ranks], team, out);
  if (out.layout == Layout::kExpanded && out.padding == Padding::kZero) {
    // The last warps of each block land what is said of tokens, and are done before those that copy rows.
    const Team warps = across(team, warp, device::num_threads() / 32).backwards();
    zero_padding(record.row_bytes, routing.experts_per_rank, alignment, tables, warps, out);
  }
}

}  // namespace deep_ep
