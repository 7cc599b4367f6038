#pragma once
// A launch's blocks form teams: the first ones send, those behind them receive, and the last ones count before that.
// Each team divides its work among its own blocks.

#include <deep_ep/device/device.cuh>

namespace deep_ep {

struct Blocks {
  int first, count;

  EP_DEVICE int end() const { return first + count; }
  EP_DEVICE int own() const { return device::block_idx() - first; }  // this block's number in its team
  EP_DEVICE bool has_own() const { return own() >= 0 && own() < count; }
};

// One of several warps that divide work among themselves.
struct Team {
  int own = -1, count = 0;  // this warp's number, and how many there are; unless given, there is no team

  EP_DEVICE Team backwards() const { return {count - 1 - own, count}; }
};

// The warp that is the `warp`-th of `num_warps` in each of the blocks. Neighbours are in different blocks: so few rows
// are spread over all SMs, each of which moves only so much.
EP_DEVICE Team across(const Blocks& blocks, int warp, int num_warps) {
  return {warp * blocks.count + blocks.own(), num_warps * blocks.count};
}

EP_DEVICE bool sends(int num_send_blocks) { return device::block_idx() < num_send_blocks; }

// From block `first` to the launch's last.
EP_DEVICE Blocks blocks_from(int first) { return {first, device::num_blocks() - first}; }

// While a block counts, its last warp asks what the others call and learns what comes; the rest do the counting.
EP_DEVICE bool asks_others() { return device::warp_idx() == device::num_threads() / 32 - 1; }
EP_DEVICE int num_counting_threads() { return device::num_threads() - 32; }

// Among the threads that count.
EP_DEVICE void sync_counting() { device::sync_named(1, num_counting_threads()); }

// From the warp that asks, to them.
EP_DEVICE void give_answer() { device::arrive_named(2, device::num_threads()); }
EP_DEVICE void hear_answer() { device::sync_named(2, device::num_threads()); }

}  // namespace deep_ep
