#pragma once
// A launch's blocks form two teams, senders first, then receivers; each divides its work among its own blocks.

#include <deep_ep/device/device.cuh>

namespace deep_ep {

struct Blocks {
  int first, count;

  EP_DEVICE int end() const { return first + count; }
  EP_DEVICE int own() const { return device::block_idx() - first; }  // this block's number in its team
};

EP_DEVICE bool sends(int num_send_blocks) { return device::block_idx() < num_send_blocks; }

EP_DEVICE Blocks team_of_block(int num_send_blocks) {
  if (sends(num_send_blocks)) return {0, num_send_blocks};
  return {num_send_blocks, device::num_blocks() - num_send_blocks};
}

}  // namespace deep_ep
