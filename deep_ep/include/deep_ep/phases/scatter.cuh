#pragma once
// reads         x and its scale factors, topk_idx
// writes        staged records at the peers
// waits for     its own bulk stores (admit has let us in)
// leaves behind at each peer whole records, which the herald announces (announce.cuh)
//
// A row is loaded once and stored once for each peer that it goes to. Its place there is its number among this rank's
// tokens, so nothing has to be counted first.

#include <deep_ep/phases/announce.cuh>
#include <deep_ep/phases/claims.cuh>
#include <deep_ep/phases/payload.cuh>
#include <deep_ep/phases/ring.cuh>
#include <deep_ep/wire/routing.cuh>
#include <deep_ep/wire/window.cuh>

namespace deep_ep {

template <class Ring>
EP_DEVICE void scatter(const Ring& ring, const Window& window, const Routing& routing, const Rows& rows,
                       const Scales& scales, const Record& record, int piece_bytes, uint32_t epoch, Mailbox& box,
                       const Team& team) {
  const int lane = device::lane_idx();
  Announcer<By::kHerald> announcer(window, epoch, box);
  Claims claims(window, Queue::kSend, team);
  int ahead = -1, token = -1, offset = 0;  // ahead: the token after the one being loaded, if known
  uint32_t ranks = 0;                      // the peers that the token goes to
  Choice next;

  // Turns to the next token. False if it stays here.
  const auto turn = [&] {
    token = ahead;
    ahead = -1;
    const Selection selection = select(routing, next.expert);
    ranks = 0;
    EP_NO_UNROLL
    for (uint32_t left = device::ballot(selection.speaks && selection.rank != window.rank); left != 0;
         left &= left - 1) {
      ranks |= 1u << device::shuffle(selection.rank, lowest_bit(left));
    }
    return ranks != 0;
  };
  const auto load = [&](Stage stage) {
    const int bytes = min_of(piece_bytes, record.row_bytes - offset);
    const bool last = offset + bytes == record.row_bytes;
    const bool gathers = last && scales.count > 0 && !scales.in_rows;
    if (gathers) {
      gather_scales(scales, token, stage.data + bytes);
      device::fence_async_proxy_shared();
      device::sync_warp();
    }
    if (device::elect()) {
      *stage.ticket = {.token = token,
                       .offset = offset,
                       .bytes = last ? bytes + record.tail_bytes : bytes,
                       .last = last,
                       .ranks = ranks};
      const int scale_bytes = last && !gathers ? scales.bytes() : 0;
      device::mbarrier_arrive_expect(*stage.full, bytes + scale_bytes);
      device::bulk_load(stage.data, rows.row(token) + offset, bytes, *stage.full);
      if (scale_bytes > 0) device::bulk_load(stage.data + bytes, scales.row(token), scale_bytes, *stage.full);
    }
    offset = last ? 0 : offset + bytes;
  };

  const auto fill = [&](Stage stage, bool) {
    if (offset == 0 && ahead >= routing.num_tokens) return Filled::kNoMore;
    const bool loads = offset > 0 || (ahead >= 0 && turn());
    if (loads) load(stage);
    if (ahead < 0) {
      ahead = claims.take();
      next = load_choice(routing, nullptr, ahead);
    }
    return loads ? Filled::kYes : Filled::kNotYet;
  };
  const auto drain = [&](Stage stage) {
    const Ticket& ticket = *stage.ticket;
    if (device::elect()) {
      EP_NO_UNROLL
      for (uint32_t left = ticket.ranks; left != 0; left &= left - 1) {
        char* to = staged(window, lowest_bit(left), window.rank, ticket.token, routing.max_tokens, record.bytes());
        device::bulk_store(to + ticket.offset, stage.data, ticket.bytes);
      }
    }
    if (ticket.last) announcer.add(ticket.ranks >> lane & 1 ? ticket.token : -1);
  };
  ring.run(fill, drain, [&](int pieces) { announcer.after(pieces); });
  announcer.finish();
}

}  // namespace deep_ep
