#pragma once
// reads         x, and the routing and places of all tokens
// writes        staged records and arrival marks at the peers
// waits for     its own bulk stores (admit has let us in, and await_settled)
// leaves behind at each peer a whole record before its mark (announce.cuh)
//
// A row is loaded once and stored once for each peer that it goes to.

#include <deep_ep/phases/announce.cuh>
#include <deep_ep/phases/claims.cuh>
#include <deep_ep/phases/compose.cuh>
#include <deep_ep/phases/ring.cuh>
#include <deep_ep/wire/window.cuh>

namespace deep_ep {

struct Rows {
  const char* x;
  int64_t stride;  // bytes
};

template <class Ring>
EP_DEVICE void scatter(const Ring& ring, const Window& window, uint32_t epoch, const Routing& routing,
                       const TokenTables& tables, const Rows& rows, const Record& record, int piece_bytes) {
  constexpr int kTokens = 8;  // that share a release
  const int lane = device::lane_idx();
  Announcer announcer(window, epoch, kTokens);
  Claims claims(window, Queue::kSend);
  int ahead = -1, token = -1, offset = 0, slot_at_rank = -1;  // ahead: the token after the one being loaded, if known
  Choice next, choice;

  // Turns to the next token. False if it stays here; else lane r learns its slot at rank r.
  const auto turn = [&] {
    token = ahead;
    choice = next;
    ahead = -1;
    const Selection selection = select(routing, choice.expert);
    uint32_t speakers = device::ballot(selection.speaks && selection.rank != window.rank);
    slot_at_rank = -1;
    const bool leaves = speakers != 0;
    EP_NO_UNROLL
    for (; speakers != 0; speakers &= speakers - 1) {
      const int rank = device::shuffle(selection.rank, lowest_bit(speakers));
      const int slot = device::shuffle(choice.slot, lowest_bit(speakers));
      if (lane == rank) slot_at_rank = slot;
    }
    return leaves;
  };
  const auto load = [&](Stage stage) {
    const int bytes = min_of(piece_bytes, record.row_bytes - offset);
    const bool last = offset + bytes == record.row_bytes;
    if (last) {
      compose_tail(routing, tables.scales, token, choice, stage.data + bytes);
      device::fence_async_proxy_shared();
    }
    if (lane < window.num_ranks) stage.ticket->slot[lane] = slot_at_rank;
    device::sync_warp();
    if (device::elect()) {
      stage.ticket->offset = offset;
      stage.ticket->bytes = last ? bytes + record.tail_bytes : bytes;
      stage.ticket->last = last;
      device::mbarrier_arrive_expect(*stage.full, bytes);
      device::bulk_load(stage.data, rows.x + token * rows.stride + offset, bytes, *stage.full);
    }
    device::sync_warp();
    offset = last ? 0 : offset + bytes;
  };

  const auto fill = [&](Stage stage, bool) {
    if (offset == 0 && ahead >= routing.num_tokens) return Filled::kNoMore;
    const bool loads = offset > 0 || (ahead >= 0 && turn());
    if (loads) load(stage);
    // Behind the load and, in long rows, before the last piece's fence, which would wait for it.
    if (ahead < 0) {
      ahead = claims.take();
      next = load_choice(routing, tables, ahead, routing.num_tokens);
    }
    return loads ? Filled::kYes : Filled::kNotYet;
  };
  int drained = 0;
  const auto drain = [&](Stage stage) {
    const Ticket& ticket = *stage.ticket;
    if (device::elect()) {
      EP_NO_UNROLL
      for (int rank = 0; rank < window.num_ranks; ++rank) {
        if (ticket.slot[rank] < 0) continue;
        char* to = staged(window, rank, window.rank, ticket.slot[rank], routing.max_tokens, record.bytes());
        device::bulk_store(to + ticket.offset, stage.data, ticket.bytes);
      }
    }
    ++drained;
    if (ticket.last) announcer.add(lane < window.num_ranks ? ticket.slot[lane] : -1);
  };
  ring.run(fill, drain, [&](int pieces) { announcer.after(pieces); });
  announcer.finish();
}

}  // namespace deep_ep
