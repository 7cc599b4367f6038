#pragma once
// Telling peers that records have come, a few tokens at a time. A release waits until all of a warp's accesses have
// been performed. Where that would hold up the link, the warps that send leave it to others, a herald each, and hand
// over what is complete.
//
// reads         nothing
// writes        arrival marks at the peers
// waits for     the sending warp's own bulk stores; the herald, if any, for the sender, and it for the herald
// leaves behind at each peer a whole record before its mark: the mark is a release, read with load_acquire_sys

#include <deep_ep/device/device.cuh>
#include <deep_ep/wire/integers.cuh>
#include <deep_ep/wire/window.cuh>

namespace deep_ep {

// What a sending warp hands to its herald, in shared memory.
struct alignas(16) Mailbox {
  device::Mbarrier full, empty;
  int32_t slots[32];  // lane l's: a slot at rank l % num_ranks, or -1
  int32_t is_last;

  static constexpr int bytes(int num_warps) { return (num_warps * int(sizeof(Mailbox)) + 127) / 128 * 128; }
};

// Before the block synchronises, and by all its threads.
EP_DEVICE void open_mailboxes(Mailbox* boxes, int num_warps) {
  const int warp = device::thread_idx();
  if (warp >= num_warps) return;
  device::mbarrier_init(boxes[warp].full, 32);  // every lane arrives, for what it wrote, or read
  device::mbarrier_init(boxes[warp].empty, 32);
  device::fence_mbarrier_init();
}

enum class By { kSender, kHerald };

// To the ranks that some lanes stand for: lane l has a slot at rank l % num_ranks, or -1.
EP_DEVICE void release_slots(const Window& window, uint32_t epoch, int slot_of_lane) {
  const int rank = device::lane_idx() % window.num_ranks;
  if (slot_of_lane >= 0) device::store_release_sys(arrived(window, rank, window.rank, slot_of_lane), epoch);
}

// A sending warp's side of it; `box` is that of its herald.
template <By kBy>
class Announcer {
 public:
  static constexpr int kLag = 4;    // pieces that are stored after a batch before it is handed over
  static constexpr int kBatch = 4;  // tokens that are handed over together, at most

  EP_DEVICE Announcer(const Window& window, uint32_t epoch, Mailbox& box)
      : window_(window), epoch_(epoch), box_(box), batch_(min_of(kBatch, 32 / window.num_ranks)) {}

  // The piece that is being stored is the last of a token that goes to `slot_at_rank` of rank r on lane r (-1: not
  // there).
  EP_DEVICE void add(int slot_at_rank) {
    const int lane = device::lane_idx();
    const int slot = device::shuffle(slot_at_rank, lane % window_.num_ranks);
    if (lane / window_.num_ranks == open_) open_slot_ = slot;
    ++open_;
  }

  // `pieces` have been stored.
  EP_DEVICE void after(int pieces) {
    const bool is_full = open_ == batch_, is_due = pieces >= closed_ + kLag;
    if (closed_ > 0 && (is_due || is_full)) hand_over(is_due, false);
    if (is_full) close(pieces);
  }

  // All has been stored and waited for.
  EP_DEVICE void finish() {
    hand_over(false, false);  // the batch that waits
    close(0);
    hand_over(false, true);  // the one that fills
  }

 private:
  EP_DEVICE void close(int pieces) {
    closed_ = pieces;
    closed_slot_ = open_slot_;
    open_ = 0;
    open_slot_ = -1;
  }

  // Of the pieces that were stored after the batch, kLag need not be complete when it is due, and one before.
  EP_DEVICE void hand_over(bool is_due, bool is_last) {
    if (device::elect()) {
      if (is_due) {
        device::bulk_wait<kLag>();
      } else {
        device::bulk_wait<1>();
      }
    }
    if constexpr (kBy == By::kSender) {
      device::sync_warp();  // one lane has waited for all
      release_slots(window_, epoch_, closed_slot_);
    } else {
      if (handed_over_ > 0) device::mbarrier_wait(box_.empty, (handed_over_ - 1) & 1);
      ++handed_over_;
      box_.slots[device::lane_idx()] = closed_slot_;
      if (device::lane_idx() == 0) box_.is_last = is_last;
      device::mbarrier_arrive(box_.full);
    }
    closed_slot_ = -1;
    closed_ = 0;
  }

  const Window& window_;
  const uint32_t epoch_;
  Mailbox& box_;
  const int batch_;
  int open_ = 0, open_slot_ = -1;      // tokens, and this lane's slot, of the batch that fills
  int closed_ = 0, closed_slot_ = -1;  // pieces stored up to the end of the batch that waits; this lane's slot in it
  int handed_over_ = 0;
};

// What a herald does, until its sender has no more.
EP_DEVICE void announce(const Window& window, uint32_t epoch, Mailbox& box) {
  const int lane = device::lane_idx();
  bool is_last = false;
  EP_NO_UNROLL
  for (int taken = 0; !is_last; ++taken) {
    device::mbarrier_wait(box.full, taken & 1);
    const int slot = box.slots[lane];
    is_last = box.is_last != 0;
    device::mbarrier_arrive(box.empty);
    release_slots(window, epoch, slot);
  }
}

}  // namespace deep_ep
