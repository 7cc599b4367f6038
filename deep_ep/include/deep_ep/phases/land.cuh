#pragma once
// What is to be known beside a row: its label goes where it belongs, and says where the row goes in the expanded layout.
//
// reads         a token's label words; a handle's metadata
// writes        recv_topk_idx, recv_topk_weights, recv_src_metadata
// waits for     the label words, if they are not there yet
// leaves behind everything about a received token but its row and scale factors

#include <deep_ep/phases/payload.cuh>
#include <deep_ep/phases/ring.cuh>
#include <deep_ep/phases/tables.cuh>
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

// What a stage keeps of a label until its token is landed; lane k writes and reads selection k's alone.
struct Kept {
  uint32_t place = Place::kNone, weight = 0;
};

// What lane k is told of selection k of a token: its label words at a first look, so that nobody waits for them.
struct Said {
  uint64_t place = 0, weight = 0;

  // Asks for the words of a token that is known to come here.
  EP_DEVICE static Said ask(const Landing& landing, int source, int token) {
    const int k = device::lane_idx();
    if (k >= landing.routing.num_topk) return {};
    const uint64_t* words = of(landing, source, token);
    return {device::load_relaxed_sys(words), device::load_relaxed_sys(words + 1)};
  }

  // Collective over the warp. Without words in the end it says that the selection is of no expert.
  EP_DEVICE void keep(const Landing& landing, int source, int token, char* at) const {
    const int k = device::lane_idx(), num_topk = landing.routing.num_topk;
    int packed = static_cast<int>(static_cast<uint32_t>(place)), bits = static_cast<int>(static_cast<uint32_t>(weight));
    const bool is_late = k < num_topk && !(is_there(landing, place) && is_there(landing, weight));
    if (device::ballot(is_late) != 0 && is_late) {
      const uint64_t* words = of(landing, source, token);
      const auto await = [&](const uint64_t* from, int& value) {
        return await_word(from, landing.epoch, landing.patience, phase::kLabel, source, value);
      };
      if (!await(words, packed) || !await(words + 1, bits)) packed = static_cast<int>(Place::kNone);
    }
    device::sync_warp();
    if (k < num_topk) reinterpret_cast<Kept*>(at)[k] = {static_cast<uint32_t>(packed), static_cast<uint32_t>(bits)};
  }

 private:
  EP_DEVICE static uint64_t* of(const Landing& landing, int source, int token) {
    const Routing& routing = landing.routing;
    return label(landing.window, landing.window.rank, source, token, device::lane_idx(), routing.max_tokens,
                 routing.num_topk);
  }
  EP_DEVICE static bool is_there(const Landing& landing, uint64_t seen) {
    return static_cast<uint32_t>(seen >> 32) == landing.epoch;
  }
};

// Lane k learns the row of selection k in the expanded layout, or -1; `local` is its expert here, or -1.
EP_DEVICE int find_row(const Landing& landing, const Ticket& ticket, int local, int position) {
  const Received& out = landing.out;
  const int k = device::lane_idx(), num_topk = landing.routing.num_topk;
  int expanded = -1;
  if (out.known_metadata == nullptr) {
    const int first = ticket.rank * landing.routing.experts_per_rank;
    if (local >= 0) expanded = landing.tables.expert_row[first + local] + position;
  } else if (k < num_topk && out.layout == Layout::kExpanded) {
    expanded = out.known_metadata[int64_t(ticket.row) * (num_topk + 2) + 2 + k];
  }
  return expanded < out.expanded_rows ? expanded : -1;  // more than the worst case: some token names an expert twice
}

// Puts all that is said of the ticket's token where it belongs. Returns, to lane k, the row of selection k in the
// expanded layout, or -1.
EP_DEVICE int land_label(const Landing& landing, const Ticket& ticket, char* at) {
  const Routing& routing = landing.routing;
  const Received& out = landing.out;
  const int k = device::lane_idx(), num_topk = routing.num_topk, row = ticket.row, rank = landing.window.rank;
  const Kept kept = k < num_topk ? reinterpret_cast<const Kept*>(at)[k] : Kept{};
  const int expert = Place::unpack(kept.place).expert, position = Place::unpack(kept.place).position;
  const float weight = __builtin_bit_cast(float, kept.weight);
  const bool here = expert >= 0 && routing.rank_of(expert) == rank;
  const int local = here ? expert - rank * routing.experts_per_rank : -1;
  const int expanded = find_row(landing, ticket, local, position);

  const uint32_t chosen = device::ballot(here);
  if (out.metadata != nullptr) {
    int32_t* metadata = out.metadata + int64_t(row) * (num_topk + 2);
    if (k == 0) {
      metadata[0] = ticket.rank * routing.max_tokens + ticket.token;
      metadata[1] = ticket.rank * num_topk + highest_bit(chosen);
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
