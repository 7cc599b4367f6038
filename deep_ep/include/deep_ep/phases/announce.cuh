#pragma once
// Telling peers that records have come, a few at a time: a release waits for all that the warp wrote before, so one is
// spent on several tokens, and only after their stores have had time to complete.
//
// reads         nothing
// writes        arrival marks at the peers
// waits for     the warp's own bulk stores
// leaves behind at each peer a whole record before its mark: the mark is a release, read with load_acquire_sys

#include <deep_ep/device/device.cuh>
#include <deep_ep/wire/integers.cuh>
#include <deep_ep/wire/window.cuh>

namespace deep_ep {

class Announcer {
 public:
  static constexpr int kLag = 6;  // pieces that are stored after a batch before its release is made

  // `batch`: tokens that share a release, at most. A smaller one costs the sender more, and tells the peers sooner.
  EP_DEVICE Announcer(const Window& window, uint32_t epoch, int batch)
      : window_(window), epoch_(epoch), batch_(min_of(batch, 32 / window.num_ranks)) {}

  // The piece that is being stored is the last of a token that goes to `slot_at_rank` of rank r on lane r (-1: not there).
  EP_DEVICE void add(int slot_at_rank) {
    const int lane = device::lane_idx();
    const int slot = device::shuffle(slot_at_rank, lane % window_.num_ranks);
    if (lane / window_.num_ranks == open_) open_slot_ = slot;
    ++open_;
  }

  // `pieces` have been stored.
  EP_DEVICE void after(int pieces) {
    const bool is_full = open_ == batch_, is_due = pieces >= closed_ + kLag;
    if (closed_ > 0 && (is_due || is_full)) release(is_due);
    if (is_full) close(pieces);
  }

  // All has been stored and waited for.
  EP_DEVICE void finish() {
    EP_NO_UNROLL
    for (int batch = 0; batch < 2; ++batch) {  // the one that waits, and the one that fills
      release(false);
      close(0);
    }
  }

 private:
  EP_DEVICE void close(int pieces) {
    closed_ = pieces;
    closed_slot_ = open_slot_;
    open_ = 0;
    open_slot_ = -1;
  }

  // Of the pieces that were stored after the batch, kLag need not be complete when it is due, and one before.
  EP_DEVICE void release(bool is_due) {
    if (device::elect()) {
      if (is_due) {
        device::bulk_wait<kLag>();
      } else {
        device::bulk_wait<1>();
      }
    }
    device::sync_warp();
    if (closed_slot_ >= 0) {
      const int rank = device::lane_idx() % window_.num_ranks;
      device::store_release_sys(arrived(window_, rank, window_.rank, closed_slot_), epoch_);
    }
    closed_slot_ = -1;
    closed_ = 0;
  }

  const Window& window_;
  const uint32_t epoch_;
  const int batch_;
  int open_ = 0, open_slot_ = -1;      // tokens, and this lane's slot, of the batch that fills
  int closed_ = 0, closed_slot_ = -1;  // pieces stored up to the end of the batch that waits; this lane's slot in it
};

}  // namespace deep_ep
