#pragma once
// reads         own rows of x; staged records of the peers, or their rows in place; labels
// writes        recv_x and its scale factors; with them, what land.cuh puts beside a row
// waits for     the tokens (arrivals.cuh): it takes whatever has come
// leaves behind every received row in its final place
//
// Own tokens never touch the staging region. A row is loaded once, and stored once for each place that it has: one in
// the plain layout, one for each selection of an expert of this rank in the expanded one. Its label, which says where,
// is kept with the first piece, its scale factors come with the last.

#include <deep_ep/phases/arrivals.cuh>
#include <deep_ep/phases/land.cuh>
#include <deep_ep/phases/payload.cuh>
#include <deep_ep/phases/ring.cuh>
#include <deep_ep/wire/integers.cuh>

namespace deep_ep {

// Loads the pieces of one token after the other.
template <bool kInPlace>
class Loader {
 public:
  EP_DEVICE Loader(const Landing& landing, int piece_bytes) : landing_(landing), piece_bytes_(piece_bytes) {}

  EP_DEVICE bool is_between_tokens() const { return offset_ == 0; }

  // `said`: what its label words say.
  EP_DEVICE void turn_to(const Arrivals::Item& token, const Said& said) {
    const Window& window = landing_.window;
    said_ = said;
    const Record& record = landing_.record;
    token_ = token;
    if (is_own()) {
      from_ = landing_.rows.row(token.token);
    } else if constexpr (kInPlace) {
      from_ = landing_.tables.found[token.source].rows + int64_t(token.token) * record.row_bytes;
    } else {
      from_ = staged(window, window.rank, token.source, token.token, landing_.routing.max_tokens, record.bytes());
    }
  }

  // Collective over the warp.
  EP_DEVICE void load(const Stage& stage) {
    const Window& window = landing_.window;
    const Routing& routing = landing_.routing;
    const Scales& scales = landing_.scales;
    const Record& record = landing_.record;
    const int bytes = min_of(piece_bytes_, record.row_bytes - offset_);
    const bool first = offset_ == 0, last = offset_ + bytes == record.row_bytes, has_scales = last && scales.count > 0;
    const bool gathers = has_scales && is_own() && !scales.in_rows;
    if (gathers) {
      gather_scales(scales, token_.token, stage.data + bytes);
      device::fence_async_proxy_shared();
      device::sync_warp();
    }
    if (device::elect()) {
      *stage.ticket = {.token = token_.token,
                       .row = landing_.tables.row_base[token_.source] + token_.slot,
                       .rank = token_.source,
                       .offset = offset_,
                       .bytes = bytes,
                       .first = first,
                       .last = last};
      // A record's scale factors lie right behind its row.
      const bool apart = has_scales && (is_own() || kInPlace) && !gathers,
                 behind = has_scales && !is_own() && !kInPlace;
      const int here = behind ? bytes + record.tail_bytes : bytes;
      const int there = apart ? scales.bytes() : 0;
      device::mbarrier_arrive_expect(*stage.full, here + there);
      device::bulk_load(stage.data, from_ + offset_, here, *stage.full);
      if (apart) device::bulk_load(stage.data + bytes, scales_apart(), there, *stage.full);
    }
    if (first) said_.keep(landing_, token_.source, token_.token, label_of(stage, bytes));
    device::sync_warp();
    offset_ = last ? 0 : offset_ + bytes;
  }

  // Where a stage holds the label: behind its first piece, which is the longest, and behind scale factors if it has any.
  // The copy engine never comes there.
  EP_DEVICE char* label_of(const Stage& stage, int piece_bytes) const {
    return stage.data + piece_bytes + landing_.record.tail_bytes;
  }

 private:
  EP_DEVICE bool is_own() const { return token_.source == landing_.window.rank; }

  EP_DEVICE const void* scales_apart() const {
    const Scales& scales = landing_.scales;
    if (is_own()) return scales.row(token_.token);
    return landing_.tables.found[token_.source].beside + int64_t(token_.token) * scales.bytes();
  }

  const Landing& landing_;
  const int piece_bytes_;
  Arrivals::Item token_ = {-1, -1, -1};
  Said said_;
  const char* from_ = nullptr;
  int offset_ = 0;
};

template <bool kInPlace, class Ring>
EP_DEVICE void copy_out(const Ring& ring, const Landing& landing, uint32_t epoch, int piece_bytes, int warp,
                        int num_warps, const device::Patience& patience) {
  const Received& out = landing.out;
  constexpr From kPeers = kInPlace ? From::kPeersInPlace : From::kPeers;
  Arrivals peers(landing.window, epoch, landing.tables, patience, kPeers, warp, num_warps);
  Arrivals own(landing.window, epoch, landing.tables, patience, From::kSelf, warp, num_warps);
  Loader<kInPlace> loader(landing, piece_bytes);
  Arrivals::Item next;  // a token ahead, so that nobody waits for its label words
  Said next_said;
  bool has_next = false, own_first = false;

  // What has come from peers goes first; own rows fill the time in which nothing has. What lies in place has come at
  // once, but the link takes its time: so every other row is an own one.
  const auto look_for_next = [&](bool patient) {
    const Look look = patient ? Look::kUntilOneHasCome : Look::kOnce;
    has_next = (own_first && own.take(Look::kOnce, next)) || peers.take(Look::kOnce, next) || own.take(look, next) ||
               (patient && peers.take(look, next));
    if (!has_next) return;
    own_first = kInPlace && !own_first;
    next_said = Said::ask(landing, next.source, next.token);
  };
  const auto fill = [&](const Stage& stage, bool patient) {
    if (loader.is_between_tokens()) {
      if (!has_next) look_for_next(patient);
      if (!has_next) return peers.more() || own.more() ? Filled::kNotYet : Filled::kNoMore;
      loader.turn_to(next, next_said);
      look_for_next(false);
    }
    loader.load(stage);
    return Filled::kYes;
  };

  int row_of_selection = -1;  // of the token being stored
  const auto drain = [&](const Stage& stage) {
    const Ticket& ticket = *stage.ticket;
    const bool with_scales = ticket.last && out.scales.count > 0, spreads = with_scales && !out.scales.in_rows;
    const char* stage_scales = stage.data + ticket.bytes;
    const auto store = [&](int to) {
      if (device::elect()) {
        device::bulk_store(out.x + to * out.stride + ticket.offset, stage.data, ticket.bytes);
        if (with_scales && !spreads) device::bulk_store(out.scales.row(to), stage_scales, out.scales.bytes());
      }
      if (spreads) spread_scales(out.scales, to, stage_scales);
    };
    if (out.layout == Layout::kPlain) store(ticket.row);
    if (ticket.first) row_of_selection = land_label(landing, ticket, loader.label_of(stage, ticket.bytes));
    if (out.layout == Layout::kExpanded) {
      EP_NO_UNROLL
      for (uint32_t left = device::ballot(row_of_selection >= 0); left != 0; left &= left - 1) {
        store(device::shuffle(row_of_selection, lowest_bit(left)));
      }
    }
    if (spreads) device::fence_async_proxy_shared();  // they have been read: the stage may be loaded again
  };
  ring.run(fill, drain, [](int) {});
}

}  // namespace deep_ep
