#pragma once
// reads         own rows of x; staged records of the peers, or their rows in place; places, for the expanded layout
// writes        recv_x and its scale factors
// waits for     the tokens (arrivals.cuh): it takes whatever has come; a place, if it is not there yet
// leaves behind every received row in its final place
//
// Own tokens never touch the staging region. A row is loaded once, and stored once for each place that it has: one in
// the plain layout, one for each selection of an expert of this rank in the expanded one. The places, which say where,
// are kept with the first piece, scale factors come with the last.

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

  EP_DEVICE void turn_to(const Arrivals::Item& token) {
    const Window& window = landing_.window;
    const Record& record = landing_.record;
    token_ = token;
    if (asks_places())
      place_ = device::load_relaxed_sys(place_word());  // nobody looks at it before the row is asked for
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
    if (first && asks_places()) {
      uint32_t packed;
      if (!resolve(landing_, place_word(), place_, token_.source, packed)) packed = Place::kNone;
      kept_places(stage, bytes)[device::lane_idx()] = packed;
    }
    device::sync_warp();
    offset_ = last ? 0 : offset_ + bytes;
  }

  // Lane k learns the row of selection k in the expanded layout, or -1, when the first piece of a token has come.
  EP_DEVICE int row_of_lane(const Stage& stage) const {
    const int k = device::lane_idx();
    if (k >= landing_.routing.num_topk) return -1;
    const Ticket& ticket = *stage.ticket;
    const bool is_kept = landing_.out.known_metadata == nullptr;
    const uint32_t packed = is_kept ? kept_places(stage, ticket.bytes)[k] : Place::kNone;
    return find_row(landing_, ticket.rank, ticket.row, k, Place::unpack(packed));
  }

 private:
  EP_DEVICE bool is_own() const { return token_.source == landing_.window.rank; }

  EP_DEVICE const void* scales_apart() const {
    const Scales& scales = landing_.scales;
    if (is_own()) return scales.row(token_.token);
    return landing_.tables.found[token_.source].beside + int64_t(token_.token) * scales.bytes();
  }

  // Whether this lane has a selection of which the row follows from its label.
  EP_DEVICE bool asks_places() const {
    const Received& out = landing_.out;
    return out.layout == Layout::kExpanded && out.known_metadata == nullptr &&
           device::lane_idx() < landing_.routing.num_topk;
  }
  EP_DEVICE const uint64_t* place_word() const {
    return label_word(landing_, token_.source, token_.token, device::lane_idx(), 0);
  }

  // Where a stage keeps them, each lane its own: behind the first piece, which is the longest, and behind scale factors
  // if it has any. The copy engine never comes there.
  EP_DEVICE uint32_t* kept_places(const Stage& stage, int piece_bytes) const {
    return reinterpret_cast<uint32_t*>(stage.data + piece_bytes + landing_.record.tail_bytes);
  }

  const Landing& landing_;
  const int piece_bytes_;
  Arrivals::Item token_ = {-1, -1, -1};
  uint64_t place_ = 0;  // as it was at a first look
  const char* from_ = nullptr;
  int offset_ = 0;
};

template <bool kInPlace, class Ring>
EP_DEVICE void copy_out(const Ring& ring, const Landing& landing, int piece_bytes, const Team& team) {
  const Received& out = landing.out;
  constexpr From kPeers = kInPlace ? From::kPeersInPlace : From::kPeers;
  // Own rows from the other end: of few, no warp has one of each kind while another has none.
  Arrivals peers(landing.window, landing.epoch, landing.tables, landing.patience, kPeers, team);
  Arrivals own(landing.window, landing.epoch, landing.tables, landing.patience, From::kSelf, team.backwards());
  Loader<kInPlace> loader(landing, piece_bytes);
  bool own_first = false;

  // What has come from peers goes first; own rows fill the time in which nothing has. What lies in place has come at
  // once, but the link takes its time: so every other row is an own one.
  const auto fill = [&](const Stage& stage, bool patient) {
    if (loader.is_between_tokens()) {
      Arrivals::Item token;
      const Look look = patient ? Look::kUntilOneHasCome : Look::kOnce;
      const bool found = (own_first && own.take(Look::kOnce, token)) || peers.take(Look::kOnce, token) ||
                         own.take(look, token) || (patient && peers.take(look, token));
      own_first = kInPlace && !own_first;
      if (!found) return peers.more() || own.more() ? Filled::kNotYet : Filled::kNoMore;
      loader.turn_to(token);
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
    if (out.layout == Layout::kPlain) {
      store(ticket.row);
    } else {
      if (ticket.first) row_of_selection = loader.row_of_lane(stage);
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
