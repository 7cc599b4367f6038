#pragma once
// reads         rows of x that belong to tokens of other ranks, and their weights
// writes        staged records at those ranks
// waits for     every peer to have read what this rank sent it before; its own bulk stores
// leaves behind at each owner all that a token sends there, which is announced (announce.cuh)

#include <deep_ep/phases/admit.cuh>
#include <deep_ep/phases/announce.cuh>
#include <deep_ep/phases/claims.cuh>
#include <deep_ep/phases/results.cuh>
#include <deep_ep/phases/ring.cuh>
#include <deep_ep/phases/sum.cuh>
#include <deep_ep/wire/integers.cuh>
#include <deep_ep/wire/window.cuh>

namespace deep_ep {

// A received token on its way home.
struct Parcel {
  int owner = -1, slot = -1, received = -1;  // owner -1: none is left
  int row = -1;                              // lane k's: of selection k
  int place = -1;                            // kEveryRow: of selection 0 among the owner's records
  float weight = 0.0f;                       // lane k's: of selection k
};

// The tokens that are to be sent: the first of each owner, then the second of each, ... A warp takes one at a time.
class Owed {
 public:
  EP_DEVICE Owed(const Window& window, const RowsByOwner& by_owner, const Team& team)
      : window_(window), claims_(window, Queue::kSend, team) {
    const int lane = device::lane_idx();
    if (lane < window.num_ranks) begin_of_lane_ = by_owner.begin(lane);
    if (lane < window.num_ranks && lane != window.rank) count_of_lane_ = by_owner.count(lane);
    items_ = device::reduce_max(count_of_lane_) * (window.num_ranks - 1);
  }

  EP_DEVICE Parcel next() {
    const int peers = window_.num_ranks - 1;
    Parcel parcel;
    EP_NO_UNROLL
    while (parcel.owner < 0 && item_ < items_) {
      item_ = claims_.take();
      if (item_ >= items_) break;
      const int other = item_ % peers, slot = item_ / peers;
      const int owner = other < window_.rank ? other : other + 1;
      const int begin = device::shuffle(begin_of_lane_, owner), count = device::shuffle(count_of_lane_, owner);
      if (slot < count) parcel = {owner, slot, begin + slot};
    }
    return parcel;
  }

 private:
  const Window& window_;
  Claims claims_;
  int begin_of_lane_ = 0, count_of_lane_ = 0;  // lane r's: the tokens that rank r owns
  int item_ = 0, items_;
};

// Adds `bytes` of the rows that the lanes in `lanes` point to, into a stage.
EP_DEVICE void add_into(char* stage, uint32_t lanes, const char* row_of_lane, int bytes) {
  constexpr Grasp kAtOnce = kGrasp<Return::kSum>;
  for_columns<kAtOnce.vectors>(0, bytes, [&](const auto& at) {
    auto sum = empty_sum(at);
    sum.template add_lanes<kAtOnce.rows>(lanes, row_of_lane, at);
    if (at.mine()) sum.rounded().keep(at.of(stage));
  });
}

// What can be loaded a token ahead, so that nobody waits for it.
template <Return kReturn>
EP_DEVICE Parcel next_parcel(Owed& owed, const Results& results, int max_tokens) {
  Parcel parcel = owed.next();
  if (parcel.owner < 0) return parcel;
  parcel.row = results.row_of_lane<kReturn>(parcel.received);
  if constexpr (kReturn == Return::kRow) parcel.weight = results.weight_of_lane<kReturn>(parcel.received, parcel.row);
  if constexpr (kReturn == Return::kEveryRow) {
    parcel.place = (results.token(parcel.received) - parcel.owner * max_tokens) * results.num_topk;
  }
  return parcel;
}

template <Return kReturn, By kBy, class Ring>
EP_DEVICE void push_rows(const Ring& ring, const Window& window, const Results& results, int max_tokens,
                         int piece_bytes, uint32_t epoch, const device::Patience& patience, const Team& team,
                         Mailbox& box) {
  const Record& record = results.record;
  const int lane = device::lane_idx(), num_topk = results.num_topk;
  const int num_weights = kReturn == Return::kEveryRow ? 1 : num_topk;
  Announcer<kBy> announcer(window, epoch, box);
  Owed owed(window, results.by_owner, team);
  Parcel parcel, next = next_parcel<kReturn>(owed, results, max_tokens);
  if (!admit_warp(window, epoch, patience)) return announcer.finish();
  uint32_t left = 0;  // the lanes whose rows are still to be sent; one lane, where one row stands for all
  int offset = 0;

  const auto fill = [&](Stage stage, bool) {
    const bool begins = left == 0;
    if (begins) {
      if (next.owner < 0) return Filled::kNoMore;
      parcel = next;
      left = kReturn == Return::kEveryRow ? device::ballot(parcel.row >= 0) : 1u;
      if constexpr (kReturn != Return::kRow) {
        parcel.weight = results.weight_of_lane<kReturn>(parcel.received, parcel.row);
      }
    }
    // Where an expert was named twice, rows may be lost (land.cuh). Without any the piece is empty: the mark goes
    // alone.
    const bool empty = kReturn == Return::kEveryRow && left == 0;
    const int k = empty ? 0 : lowest_bit(left), bytes = empty ? 0 : min_of(piece_bytes, record.row_bytes - offset);
    const bool row_ends = empty || offset + bytes == record.row_bytes, last = row_ends && (left & (left - 1)) == 0;
    const char* from = results.row(parcel.row) + offset;
    if constexpr (kReturn == Return::kSum) {
      if (begins) prefetch(results, parcel.row, 0, record.row_bytes);
      add_into(stage.data, device::ballot(parcel.row >= 0), from, bytes);
    } else {
      from = reinterpret_cast<const char*>(device::shuffle(reinterpret_cast<uint64_t>(from), k));
    }
    float* tail = reinterpret_cast<float*>(stage.data + bytes);
    const int entry = kReturn == Return::kEveryRow ? lane - k : lane;  // a row's own weight, or those of all selections
    if (row_ends && entry >= 0 && entry < num_weights) tail[entry] = parcel.weight;
    if (row_ends || kReturn == Return::kSum) device::fence_async_proxy_shared();
    device::sync_warp();
    if (device::elect()) {
      *stage.ticket = {.token = parcel.place + k,
                       .row = parcel.slot,
                       .rank = parcel.owner,
                       .offset = offset,
                       .bytes = row_ends && !empty ? bytes + record.tail_bytes : bytes,
                       .last = last};
      if (kReturn == Return::kSum || empty) {
        device::mbarrier_arrive(*stage.full);
      } else {
        device::mbarrier_arrive_expect(*stage.full, bytes);
        device::bulk_load(stage.data, from, bytes, *stage.full);
      }
    }
    device::sync_warp();
    // Behind the load and, in long rows, before the last piece's fence, which would wait for it.
    if (begins) next = next_parcel<kReturn>(owed, results, max_tokens);
    offset = row_ends ? 0 : offset + bytes;
    if (row_ends) left &= left - 1;
    return Filled::kYes;
  };
  const auto drain = [&](Stage stage) {
    const Ticket& ticket = *stage.ticket;
    if (device::elect() && ticket.bytes > 0) {
      char* to = kReturn == Return::kEveryRow
                     ? returned(window, ticket.rank, ticket.token, record.bytes())
                     : staged(window, ticket.rank, window.rank, ticket.row, max_tokens, record.bytes());
      device::bulk_store(to + ticket.offset, stage.data, ticket.bytes);
    }
    if (ticket.last) announcer.add(lane == ticket.rank ? ticket.row : -1);
  };
  ring.run(fill, drain, [&](int pieces) { announcer.after(pieces); });
  announcer.finish();
}

}  // namespace deep_ep
