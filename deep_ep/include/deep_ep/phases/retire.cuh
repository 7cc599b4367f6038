#pragma once
// reads         control.blocks_done, .gave_up; .drained, where peers read rows in place
// writes        control.blocks_done, .claimed, .epoch, .broken; the peers' control.drained
// waits for     nothing: the last block to come here does the work, of whatever launch; in place, for the peers to have
//               read what is here
// leaves behind at every peer the mark that its records have been read, and here the epoch of the next operation

#include <deep_ep/device/device.cuh>
#include <deep_ep/wire/phase.cuh>
#include <deep_ep/wire/window.cuh>

namespace deep_ep {

// A peer cannot be in the operation after this one yet: that takes this rank's word, too.
EP_DEVICE void await_readers(const Window& window, uint32_t epoch, const device::Patience& patience) {
  const int peer = device::lane_idx();
  if (peer < window.num_ranks && peer != window.rank) {
    device::wait_until_equals(patience, {.phase = phase::kAwaitReaders, .peer = peer, .expected = epoch},
                              [&] { return device::load_acquire_sys(&control(window, window.rank).drained[peer]); });
  }
  device::sync_warp();
}

// `num_blocks`: of all launches that the operation may have, one behind the other. `num_ended`: those for which this
// block speaks, itself included.
template <bool kInPlace>
EP_DEVICE void retire(const Window& window, uint32_t epoch, const device::Patience& patience, int num_blocks,
                      int num_ended = 1) {
  device::sync_block();
  if (device::warp_idx() != 0) return;
  Control& own = control(window, window.rank);
  uint32_t before = 0;
  if (device::elect()) before = device::fetch_add_acq_rel_gpu(&own.blocks_done, uint32_t(num_ended));
  if (device::reduce_max(static_cast<int>(before)) + num_ended != num_blocks) return;
  device::sync_warp();
  const int lane = device::lane_idx();
  uint32_t gave_up = device::load_relaxed_gpu(&own.gave_up);  // asked for before the release, which takes its time
  if (lane < window.num_ranks && lane != window.rank) {
    device::store_release_sys(&control(window, lane).drained[window.rank], epoch);
  }
  if constexpr (kInPlace) {
    await_readers(window, epoch, patience);
    gave_up = device::load_relaxed_gpu(&own.gave_up);
  }
  // Whoever comes too late must not end well with rows that are something else by then: it waits for this mark in vain.
  if (kInPlace && gave_up != 0 && lane < window.num_ranks && lane != window.rank) {
    device::store_release_sys(&control(window, lane).drained[window.rank], epoch - 1);
  }
  if (lane == 0) {
    device::store_relaxed_gpu(&own.broken, gave_up);
    device::store_relaxed_gpu(&own.blocks_done, 0u);
    for (uint32_t& claimed : own.claimed) device::store_relaxed_gpu(&claimed, 0u);
    device::store_relaxed_gpu(&own.epoch, epoch);
  }
}

}  // namespace deep_ep
