#pragma once
// reads         control.drained
// writes        tables.ok
// waits for     every peer to have read what this rank sent it in the operation before
// leaves behind permission to write to any peer, or ok == 0 (after the block has synchronised)

#include <deep_ep/phases/tables.cuh>
#include <deep_ep/wire/phase.cuh>
#include <deep_ep/wire/window.cuh>

namespace deep_ep {

EP_DEVICE void admit(const Window& window, uint32_t epoch, const device::Patience& patience, int* ok) {
  const int peer = device::thread_idx();
  if (peer < window.num_ranks && peer != window.rank) {
    const uint32_t* mark = &control(window, window.rank).drained[peer];
    // A peer that owes nothing to this rank may have finished this very operation already; it cannot be further ahead.
    const bool drained =
        device::wait_until_equals(patience, {.phase = phase::kAdmit, .peer = peer, .expected = epoch - 1}, [&] {
          const uint32_t seen = device::load_acquire_sys(mark);
          return seen == epoch ? epoch - 1 : seen;
        });
    device::fence_async_proxy_global();  // bulk stores will overwrite what the peer's copy engine has read
    if (!drained) device::store_relaxed_gpu(ok, 0);
  }
}

}  // namespace deep_ep
