#pragma once
// reads         own rows of x, staged records of the peers, biases
// writes        combined_x, combined_weights
// waits for     the arrival mark of every record that a token's sum needs
// leaves behind every token's sum
//
// The arithmetic is part of the interface: float32, biases first, then the ranks in the order in which each one's last
// selected expert appears among the token's selections, starting from +0, one rounding to bfloat16 at the end.

#include <deep_ep/phases/compose.cuh>
#include <deep_ep/phases/push_rows.cuh>
#include <deep_ep/phases/ring.cuh>
#include <deep_ep/phases/scatter.cuh>
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
  const char* bias[2];     // [num_tokens, row_bytes] or null
  int64_t bias_stride[2];  // bytes
};

constexpr int kStride = 32 * int(sizeof(device::Vector16));  // bytes that a warp takes in at once

// Adds up `parts` rows that lie `part_bytes` apart, from `at` on: kTogether vectors of eight bfloat16, kStride apart,
// at the same time. The sum takes the place of the first part.
template <int kTogether>
EP_DEVICE void add_parts(char* at, int parts, int part_bytes) {
  float sum[kTogether][8] = {};
  EP_NO_UNROLL
  for (int part = 0; part < parts; ++part) {
    device::Vector16 row[kTogether];
    for (int v = 0; v < kTogether; ++v) {
      row[v] = *reinterpret_cast<const device::Vector16*>(at + part * part_bytes + v * kStride);
    }
    for (int v = 0; v < kTogether; ++v) {
      for (int i = 0; i < 4; ++i) {
        const device::Float2 pair = device::bf16x2_to_float2(row[v].word[i]);
        sum[v][2 * i] += pair.x;
        sum[v][2 * i + 1] += pair.y;
      }
    }
  }
  for (int v = 0; v < kTogether; ++v) {
    device::Vector16 rounded;
    for (int i = 0; i < 4; ++i) rounded.word[i] = device::float2_to_bf16x2({sum[v][2 * i], sum[v][2 * i + 1]});
    *reinterpret_cast<device::Vector16*>(at + v * kStride) = rounded;
  }
}

template <class Ring>
EP_DEVICE void reduce(const Ring& ring, const Window& window, uint32_t epoch, const Routing& routing,
                      const int32_t* slots, const Rows& rows, const float* weights, const RowsByOwner& by_owner,
                      const Record& record, int piece_bytes, int first, int step, const device::Patience& patience,
                      const Combined& out) {
  const int lane = device::lane_idx(), num_topk = routing.num_topk;
  const int own_rows = by_owner.begin(window.rank);
  const TokenTables tables{slots, nullptr, nullptr};
  int token = -1, offset = 0;
  int ahead = first;  // the token after the one being added
  Choice next = load_choice(routing, tables, ahead, routing.num_tokens);
  bool chosen = false;  // `token` is the next one, but its parts have not all come
  Choice choice = next;
  Selection selection = {-1, false};
  const char* part = nullptr;  // a speaking lane's row
  uint32_t speakers = 0;

  // Chooses the next token, if need be, and looks whether all parts of its sum have come: one a speaking lane.
  const auto find_parts = [&](bool patient) {
    if (!chosen) {
      if (ahead >= routing.num_tokens) return Filled::kNoMore;
      token = ahead;
      choice = next;
      ahead += step;
      next = load_choice(routing, tables, ahead, routing.num_tokens);
      selection = select(routing, choice.expert);
      speakers = device::ballot(selection.speaks);
      chosen = true;
    }
    bool came = true;
    if (selection.speaks && selection.rank == window.rank) {
      part = rows.x + (own_rows + choice.slot) * rows.stride;
    } else if (selection.speaks) {
      const uint32_t* mark = arrived(window, window.rank, selection.rank, choice.slot);
      const auto seen = [&] { return device::load_acquire_sys(mark); };
      came = patient ? device::wait_until_equals(
                           patience, {.phase = phase::kReduce, .peer = selection.rank, .expected = epoch}, seen)
                     : seen() == epoch;
      part = staged(window, window.rank, selection.rank, choice.slot, routing.max_tokens, record.bytes());
    }
    device::fence_async_proxy_global();
    if (!device::all(came)) return patient ? Filled::kNoMore : Filled::kNotYet;
    device::sync_warp();
    chosen = false;
    return Filled::kYes;
  };
  // Each selection's weight comes from the rank of its expert.
  const auto gather_weights = [&] {
    float weight = 0.0f;
    if (selection.rank == window.rank) {
      weight = weights[int64_t(own_rows + choice.slot) * num_topk + lane];
    } else if (selection.rank >= 0) {
      const char* from = staged(window, window.rank, selection.rank, choice.slot, routing.max_tokens, record.bytes());
      weight = reinterpret_cast<const float*>(from + record.row_bytes)[lane];
    }
    if (lane < num_topk) out.weights[int64_t(token) * num_topk + lane] = weight;
  };

  const auto fill = [&](Stage stage, bool patient) {
    if (offset == 0) {
      const Filled found = find_parts(patient);
      if (found != Filled::kYes) return found;
      if (out.weights != nullptr) gather_weights();
    }
    const int bytes = min_of(piece_bytes, record.row_bytes - offset);
    const bool last = offset + bytes == record.row_bytes;
    int parts = 0;
    const auto load = [&](const char* from) {
      if (device::elect()) device::bulk_load(stage.data + parts * piece_bytes, from + offset, bytes, *stage.full);
      ++parts;
    };
    const int biases = (out.bias[0] != nullptr) + (out.bias[1] != nullptr);
    if (device::elect()) {
      const int total = biases + device::popcount(speakers);
      *stage.ticket = {.token = token, .offset = offset, .bytes = bytes, .parts = total};
      device::mbarrier_arrive_expect(*stage.full, total * bytes);
    }
    for (int i = 0; i < 2; ++i) {
      if (out.bias[i] != nullptr) load(out.bias[i] + token * out.bias_stride[i]);
    }
    EP_NO_UNROLL
    for (uint32_t left = speakers; left != 0; left &= left - 1) {
      load(reinterpret_cast<const char*>(device::shuffle(reinterpret_cast<uint64_t>(part), lowest_bit(left))));
    }
    device::sync_warp();
    offset = last ? 0 : offset + bytes;
    return Filled::kYes;
  };
  const auto drain = [&](Stage stage) {
    const Ticket& ticket = *stage.ticket;
    const int bytes = ticket.bytes, parts = ticket.parts;
    int at = lane * int(sizeof(device::Vector16));
    EP_NO_UNROLL
    for (; at + 3 * kStride < bytes; at += 4 * kStride) add_parts<4>(stage.data + at, parts, piece_bytes);
    EP_NO_UNROLL
    for (; at < bytes; at += kStride) add_parts<1>(stage.data + at, parts, piece_bytes);
    device::fence_async_proxy_shared();
    device::sync_warp();
    if (device::elect()) device::bulk_store(out.x + ticket.token * out.stride + ticket.offset, stage.data, bytes);
  };
  ring.run(fill, drain, [](int) {});
}

}  // namespace deep_ep
