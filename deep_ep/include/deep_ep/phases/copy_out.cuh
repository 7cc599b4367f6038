#pragma once
// reads         own rows of x; staged records of the peers
// writes        recv_x; with it, what land.cuh puts beside a row
// waits for     the arrival marks: it takes whatever has come
// leaves behind every received row in its final place
//
// Own tokens never touch the staging region: their tails are composed here, so both kinds are landed by the same lines.
// A row is loaded once, and stored once for each place that it has: one in the plain layout, one for each selection of an
// expert of this rank in the expanded one.

#include <deep_ep/phases/collect.cuh>
#include <deep_ep/phases/compose.cuh>
#include <deep_ep/phases/land.cuh>
#include <deep_ep/phases/scatter.cuh>
#include <deep_ep/wire/blocks.cuh>

namespace deep_ep {

// What comes from the peers, in about the order in which it is sent: the first token of every source, then the second
// of each, and so on. A warp looks at 32 of its share at a time, one a lane, and takes whichever has come.
class Arrivals {
 public:
  // What one item is: a slot of a source; -1 where there is none.
  struct Item {
    int source, slot;
  };

  EP_DEVICE Arrivals(const Window& window, uint32_t epoch, const Tables& tables, const device::Patience& patience,
                     int first, int step)
      : window_(window), epoch_(epoch), tables_(tables), patience_(patience), step_(step) {
    const int source = device::lane_idx();
    const bool is_peer = source < window.num_ranks && source != window.rank;
    const int rounds = is_peer ? tables.row_base[source + 1] - tables.row_base[source] : 0;
    items_ = device::reduce_max(rounds) * (window.num_ranks - 1);
    ahead_ = first;
  }

  // Takes an item that has come, if there is one; with `patient`, waits for one if any are at hand.
  EP_DEVICE bool take(bool patient, Item& taken) {
    if (left_ == 0) look_ahead();
    uint32_t ready = came_ & left_;
    EP_NO_UNROLL
    for (bool may_wait = patient; ready == 0; may_wait = false) {
      if (left_ == 0 || failed_) return false;
      poll();
      ready = came_ & left_;
      if (ready != 0) break;
      if (!may_wait) return false;
      wait_for(lowest_bit(left_));
    }
    const int lane = lowest_bit(ready);
    left_ &= ~(1u << lane);
    taken = {device::shuffle(mine_.source, lane), device::shuffle(mine_.slot, lane)};
    return true;
  }

  // Whether any may be left; none once one never came.
  EP_DEVICE bool more() const { return (left_ != 0 || ahead_ < items_) && !failed_; }

 private:
  // Turns to the next 32 items of which any exists.
  EP_DEVICE void look_ahead() {
    came_ = 0;
    EP_NO_UNROLL
    for (; ahead_ < items_ && left_ == 0; ahead_ += 32 * step_) {
      mine_ = at(ahead_ + device::lane_idx() * step_);
      left_ = device::ballot(mine_.slot >= 0);
    }
  }

  EP_DEVICE Item at(int item) const {
    if (item >= items_) return {-1, -1};
    const int peers = window_.num_ranks - 1;
    const int other = item % peers, slot = item / peers;
    const int source = other < window_.rank ? other : other + 1;
    return {source, slot < tables_.row_base[source + 1] - tables_.row_base[source] ? slot : -1};
  }

  EP_DEVICE uint32_t seen() const {
    return device::load_acquire_sys(arrived(window_, window_.rank, mine_.source, mine_.slot));
  }

  EP_DEVICE void poll() {
    const bool mine = left_ >> device::lane_idx() & 1;
    came_ = device::ballot(mine && seen() == epoch_);
    device::fence_async_proxy_global();
    device::sync_warp();
  }

  EP_DEVICE void wait_for(int lane) {
    bool came = true;
    if (device::lane_idx() == lane) {
      came = device::wait_until_equals(patience_, {.phase = phase::kCopyOut, .peer = mine_.source, .expected = epoch_},
                                       [&] { return seen(); });
    }
    failed_ = !device::all(came);
  }

  const Window& window_;
  const uint32_t epoch_;
  const Tables& tables_;
  const device::Patience& patience_;
  const int step_;
  int items_, ahead_;  // how many there are; the first that has not been looked at
  Item mine_ = {-1, -1};
  uint32_t left_ = 0, came_ = 0;  // lanes whose item is still to be taken; of those, whose has come
  bool failed_ = false;
};

template <class Ring>
EP_DEVICE void copy_out(const Ring& ring, const Window& window, uint32_t epoch, const Routing& routing,
                        const TokenTables& token_tables, const Rows& rows, const Record& record, int piece_bytes,
                        Range range, int warp, const Blocks& team, int num_warps, const device::Patience& patience,
                        const Tables& tables, const Received& out) {
  Arrivals arrivals(window, epoch, tables, patience, team.own() * num_warps + warp, team.count * num_warps);
  int ahead = range.begin + warp;  // this warp's next own token
  bool knows_next = false;         // whether `next` is that token's
  Choice next;

  // The token being loaded. Its pieces come in the order last, first, second, ...: the last one brings the tail, which
  // says where the others go.
  const int num_pieces = (record.row_bytes + piece_bytes - 1) / piece_bytes;
  Choice choice;
  int source = -1, row = 0, token = 0, piece = 0;
  const char* from = nullptr;

  // False also if the next own token does not stay here; then there may be more.
  const auto next_own = [&] {
    if (!knows_next || ahead >= range.end) return false;
    token = ahead;
    choice = next;
    ahead += num_warps;
    knows_next = false;
    const Selection selection = select(routing, choice.expert);
    const uint32_t here = device::ballot(selection.speaks && selection.rank == window.rank);
    if (here == 0) return false;
    source = window.rank;
    row = tables.row_base[source] + device::shuffle(choice.slot, lowest_bit(here));
    from = rows.x + token * rows.stride;
    return true;
  };
  const auto next_arrival = [&](bool patient) {
    Arrivals::Item item;
    if (!arrivals.take(patient, item)) return false;
    source = item.source;
    row = tables.row_base[source] + item.slot;
    from = staged(window, window.rank, source, item.slot, routing.max_tokens, record.bytes());
    return true;
  };
  // What has come goes first; own rows fill the time in which nothing has.
  const auto next_token = [&](bool patient) {
    return next_arrival(false) || next_own() || (patient && ahead >= range.end && next_arrival(true));
  };

  const auto load = [&](Stage stage) {
    const bool with_tail = piece == 0;
    const int offset = (with_tail ? num_pieces - 1 : piece - 1) * piece_bytes;
    const int bytes = min_of(piece_bytes, record.row_bytes - offset);
    const bool composed = source == window.rank;
    if (with_tail && composed) compose_tail(routing, token_tables.scales, token, choice, stage.data + bytes);
    device::sync_warp();
    if (device::elect()) {
      stage.ticket->row = row;
      stage.ticket->source = source;
      stage.ticket->offset = offset;
      stage.ticket->bytes = bytes;
      stage.ticket->with_tail = with_tail;
      const int loaded = with_tail && !composed ? bytes + record.tail_bytes : bytes;
      device::mbarrier_arrive_expect(*stage.full, loaded);
      device::bulk_load(stage.data, from + offset, loaded, *stage.full);
    }
    device::sync_warp();
    if (++piece == num_pieces) piece = 0;
  };
  const auto fill = [&](Stage stage, bool patient) {
    const bool loads = piece > 0 || next_token(patient);
    if (loads) load(stage);
    if (!knows_next) next = load_choice(routing, token_tables, ahead, range.end);
    knows_next = true;
    return loads ? Filled::kYes : arrivals.more() || ahead < range.end ? Filled::kNotYet : Filled::kNoMore;
  };
  int row_of_selection = -1;  // of the token being stored
  const auto drain = [&](Stage stage) {
    const Ticket& ticket = *stage.ticket;
    const auto store = [&](int to) {
      if (device::elect()) device::bulk_store(out.x + to * out.stride + ticket.offset, stage.data, ticket.bytes);
    };
    if (out.layout == Layout::kPlain) store(ticket.row);
    if (ticket.with_tail) {
      const char* tail = stage.data + ticket.bytes;
      row_of_selection = land_tail(window, routing, tables, out, ticket.source, ticket.row, tail);
    }
    if (out.layout == Layout::kPlain) return;
    EP_NO_UNROLL
    for (uint32_t left = device::ballot(row_of_selection >= 0); left != 0; left &= left - 1) {
      store(device::shuffle(row_of_selection, lowest_bit(left)));
    }
  };
  ring.run(fill, drain, [](int) {});
}

}  // namespace deep_ep
