#pragma once
// reads         control.drained
// writes        tables.ok, for a block
// waits for     every peer to have read what this rank sent it in the operation before
// leaves behind permission to write to any peer, or not (once the block has synchronised)

#include <deep_ep/phases/tables.cuh>
#include <deep_ep/wire/phase.cuh>
#include <deep_ep/wire/window.cuh>

namespace deep_ep {

// Waits for one peer; false if it does not come. Any `peer` that is none has nothing to read.
EP_DEVICE bool admitted_by(const Window& window, int peer, uint32_t epoch, const device::Patience& patience) {
  if (peer >= window.num_ranks || peer == window.rank) return true;
  const uint32_t* mark = &control(window, window.rank).drained[peer];
  // A peer that owes nothing to this rank may have finished this very operation already; it cannot be further ahead.
  const bool drained =
      device::wait_until_equals(patience, {.phase = phase::kAdmit, .peer = peer, .expected = epoch - 1}, [&] {
        const uint32_t seen = device::load_acquire_sys(mark);
        return seen == epoch ? epoch - 1 : seen;
      });
  device::fence_async_proxy_global();  // bulk stores will overwrite what the peer has read
  return drained;
}

EP_DEVICE void admit(const Window& window, uint32_t epoch, const device::Patience& patience, const Tables& tables) {
  if (!admitted_by(window, device::thread_idx(), epoch, patience)) tables.take_back(Ok::kCounts);
}

// The same for one warp, which learns at once whether it may write.
EP_DEVICE bool admit_warp(const Window& window, uint32_t epoch, const device::Patience& patience) {
  const bool admitted = device::all(admitted_by(window, device::lane_idx(), epoch, patience));
  device::sync_warp();
  return admitted;
}

}  // namespace deep_ep
