#pragma once
// Which tokens have come, for a warp that wants to copy them.
//
// reads         routed words and, of what peers send, arrival marks
// writes        nothing
// waits for     the word and the mark of a token, if it must
// leaves behind (to the warp) a whole record, that the copy engine may read

#include <deep_ep/phases/tables.cuh>
#include <deep_ep/wire/blocks.cuh>
#include <deep_ep/wire/integers.cuh>
#include <deep_ep/wire/phase.cuh>
#include <deep_ep/wire/window.cuh>

namespace deep_ep {

enum class From { kPeers, kPeersInPlace, kSelf };  // in place, rows lie ready: nobody marks them
enum class Look { kOnce, kUntilOneHasCome };

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
                     From from, const Team& team)
      : window_(window),
        epoch_(epoch),
        tables_(tables),
        patience_(patience),
        from_(from),
        step_(team.count),
        ahead_(team.own) {
    const int source = device::lane_idx();
    const bool counts = source < window.num_ranks && (source == window.rank) == (from == From::kSelf);
    items_ = device::reduce_max(counts ? tables.tokens_of[source] : 0) * num_sources();
    look_ahead();
  }

  // Takes a token that has come, if there is one; kUntilOneHasCome waits for one if any are to come.
  EP_DEVICE bool take(Look look, Item& taken) {
    uint32_t ready = came_ & left_;
    EP_NO_UNROLL
    while (ready == 0) {
      if (left_ == 0) look_ahead();
      if (left_ == 0 || failed_) return false;
      poll();
      ready = came_ & left_;
      if (ready != 0 || left_ == 0) continue;
      if (look == Look::kUntilOneHasCome) wait_for(lowest_bit(left_));
      glance();
      if (look == Look::kOnce) return false;
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
    glance();
  }

  EP_DEVICE Item at(int item) const {
    if (item >= items_) return {-1, -1, kUnknown};
    if (from_ == From::kSelf) return {window_.rank, item, kUnknown};
    const int peers = window_.num_ranks - 1, other = item % peers, token = item / peers;
    const int source = other < window_.rank ? other : other + 1;
    return {source, token < tables_.tokens_of[source] ? token : -1, kUnknown};
  }

  EP_DEVICE uint64_t* word() const { return routed(window_, window_.rank, mine_.source, mine_.token); }
  EP_DEVICE uint32_t* mark() const { return arrived(window_, window_.rank, mine_.source, mine_.token); }
  EP_DEVICE bool is_left() const { return left_ >> device::lane_idx() & 1; }

  // Asks for words and marks. The answers are looked at in the next poll, so that nobody waits for them; they order
  // nothing.
  EP_DEVICE void glance() {
    if (!is_left()) return;
    if (mine_.slot == kUnknown) seen_word_ = device::load_relaxed_sys(word());
    if (from_ == From::kPeers) seen_mark_ = device::load_relaxed_sys(mark());
  }

  EP_DEVICE void poll() {
    const bool knows = is_left() && mine_.slot == kUnknown && static_cast<uint32_t>(seen_word_ >> 32) == epoch_;
    if (knows) mine_.slot = static_cast<int>(static_cast<uint32_t>(seen_word_));
    left_ &= ~device::ballot(is_left() && mine_.slot == -1);
    const bool came = is_left() && mine_.slot >= 0 && (from_ != From::kPeers || seen_mark_ == epoch_);
    came_ = device::ballot(came);
    if (came_ == 0) return;
    if (from_ != From::kPeers) return;  // rows that were there before anything was said of them
    if (came) static_cast<void>(device::load_acquire_sys(mark()));  // once more, to acquire what it stands for
    device::fence_async_proxy_global();
    device::sync_warp();
  }

  EP_DEVICE void wait_for(int lane) {
    bool came = true;
    if (device::lane_idx() == lane) {
      const bool is_unknown = mine_.slot == kUnknown;
      const uint32_t phase = is_unknown ? phase::kLabel : phase::kCopyOut;
      came = device::wait_until_equals(patience_, {.phase = phase, .peer = mine_.source, .expected = epoch_}, [&] {
        if (!is_unknown) return device::load_relaxed_sys(mark());
        return static_cast<uint32_t>(device::load_relaxed_sys(word()) >> 32);
      });
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
  uint64_t seen_word_ = 0;  // of this lane's item, at the last glance
  uint32_t seen_mark_ = 0;
  uint32_t left_ = 0, came_ = 0;  // lanes whose item is still to be taken; of those, whose has come
  bool failed_ = false;
};

}  // namespace deep_ep
