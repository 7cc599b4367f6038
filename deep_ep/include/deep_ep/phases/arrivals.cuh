#pragma once
// Which tokens have come, for a warp that wants to copy them.
//
// reads         routed words and, of peers, arrival marks
// writes        nothing
// waits for     the word and the mark of a token, if it must
// leaves behind (to the warp) a whole record and its label, that the copy engine may read

#include <deep_ep/phases/tables.cuh>
#include <deep_ep/wire/integers.cuh>
#include <deep_ep/wire/phase.cuh>
#include <deep_ep/wire/window.cuh>

namespace deep_ep {

enum class From { kPeers, kSelf };

// Tokens of all peers, or this rank's own, in about the order in which they are sent: the first token of every source,
// then the second of each, and so on. A warp looks at 32 of its share at a time, one a lane, and takes whichever has
// come.
class Arrivals {
 public:
  struct Item {
    int source, token;
    int slot;  // among the tokens of that source that come here
  };

  EP_DEVICE Arrivals(const Window& window, uint32_t epoch, const Tables& tables, const device::Patience& patience,
                     From from, int first, int step)
      : window_(window), epoch_(epoch), tables_(tables), patience_(patience), from_(from), step_(step), ahead_(first) {
    const int source = device::lane_idx();
    const bool counts = source < window.num_ranks && (source == window.rank) == (from == From::kSelf);
    items_ = device::reduce_max(counts ? tables.tokens_of[source] : 0) * num_sources();
  }

  // Takes a token that has come, if there is one; with `patient`, waits for one if any are to come.
  EP_DEVICE bool take(bool patient, Item& taken) {
    uint32_t ready = came_ & left_;
    EP_NO_UNROLL
    while (ready == 0) {
      if (left_ == 0) look_ahead();
      if (left_ == 0 || failed_) return false;
      poll();
      ready = came_ & left_;
      if (ready != 0 || left_ == 0) continue;
      if (!patient) return false;
      wait_for(lowest_bit(left_));
    }
    const int lane = lowest_bit(ready);
    left_ &= ~(1u << lane);
    taken = {device::shuffle(mine_.source, lane), device::shuffle(mine_.token, lane),
             device::shuffle(mine_.slot, lane)};
    return true;
  }

  // Whether any may be left; none once one never came.
  EP_DEVICE bool more() const { return (left_ != 0 || ahead_ < items_) && !failed_; }

 private:
  static constexpr int kUnknown = -2;  // slot of a token of which nothing is known yet

  EP_DEVICE int num_sources() const { return from_ == From::kSelf ? 1 : window_.num_ranks - 1; }

  // Turns to the next 32 items of which any exists.
  EP_DEVICE void look_ahead() {
    came_ = 0;
    EP_NO_UNROLL
    for (; ahead_ < items_ && left_ == 0; ahead_ += 32 * step_) {
      mine_ = at(ahead_ + device::lane_idx() * step_);
      left_ = device::ballot(mine_.token >= 0);
    }
  }

  EP_DEVICE Item at(int item) const {
    if (item >= items_) return {-1, -1, kUnknown};
    if (from_ == From::kSelf) return {window_.rank, item, kUnknown};
    const int peers = window_.num_ranks - 1, other = item % peers, token = item / peers;
    const int source = other < window_.rank ? other : other + 1;
    return {source, token < tables_.tokens_of[source] ? token : -1, kUnknown};
  }

  EP_DEVICE uint64_t said() const {
    return device::load_acquire_sys(routed(window_, window_.rank, mine_.source, mine_.token));
  }
  EP_DEVICE uint32_t mark() const {
    return device::load_acquire_sys(arrived(window_, window_.rank, mine_.source, mine_.token));
  }

  EP_DEVICE void poll() {
    const bool mine = left_ >> device::lane_idx() & 1;
    if (mine && mine_.slot == kUnknown) {
      const uint64_t word = said();
      if (static_cast<uint32_t>(word >> 32) == epoch_) mine_.slot = static_cast<int>(static_cast<uint32_t>(word));
    }
    left_ &= ~device::ballot(mine && mine_.slot == -1);
    came_ = device::ballot(mine && mine_.slot >= 0 && (from_ == From::kSelf || mark() == epoch_));
    device::fence_async_proxy_global();
    device::sync_warp();
  }

  EP_DEVICE void wait_for(int lane) {
    bool came = true;
    if (device::lane_idx() == lane) {
      const bool is_unknown = mine_.slot == kUnknown;
      const uint32_t phase = is_unknown ? phase::kLabel : phase::kCopyOut;
      came = device::wait_until_equals(patience_, {.phase = phase, .peer = mine_.source, .expected = epoch_},
                                       [&] { return is_unknown ? static_cast<uint32_t>(said() >> 32) : mark(); });
    }
    failed_ = !device::all(came);
  }

  const Window& window_;
  const uint32_t epoch_;
  const Tables& tables_;
  const device::Patience& patience_;
  const From from_;
  const int step_;
  int items_ = 0, ahead_;  // how many there are; the first that has not been looked at
  Item mine_ = {-1, -1, kUnknown};
  uint32_t left_ = 0, came_ = 0;  // lanes whose item is still to be taken; of those, whose has come
  bool failed_ = false;
};

}  // namespace deep_ep
