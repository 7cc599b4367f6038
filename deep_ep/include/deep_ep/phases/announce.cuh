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

  // Piece number `pieces` was the last of a token that goes to `slot_at_rank` of rank r on lane r (-1: not there).
  EP_DEVICE void add(int slot_at_rank, int pieces) {
    const int lane = device::lane_idx();
    const int slot = device::shuffle(slot_at_rank, lane % window_.num_ranks);
    if (lane / window_.num_ranks == open_) open_slot_ = slot;
    if (++open_ < batch_) return;
    if (closed_ > 0) release<0>();
    closed_slot_ = open_slot_;
    closed_ = pieces;
    open_slot_ = -1;
    open_ = 0;
  }

  // `pieces` have been stored.
  EP_DEVICE void after(int pieces) {
    if (closed_ > 0 && pieces >= closed_ + kLag) release<kLag>();
  }

  // All has been stored and waited for.
  EP_DEVICE void finish() {
    release<0>();
    closed_slot_ = open_slot_;
    release<0>();
  }

 private:
  template <int kStillMoving>
  EP_DEVICE void release() {
    if (device::elect()) device::bulk_wait<kStillMoving>();
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
