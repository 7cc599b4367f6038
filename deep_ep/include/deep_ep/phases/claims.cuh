#pragma once
// Work that warps take as they get to it. SMs are not equally fast on the link, so fixed shares end with the slowest.
// Which warp takes an item changes nothing but the time: places follow from the routing alone.
//
// reads         control.claimed
// writes        control.claimed
// waits for     nothing
// leaves behind numbers that no other warp of this rank got in this operation (retire starts them anew)

#include <deep_ep/device/device.cuh>
#include <deep_ep/wire/blocks.cuh>
#include <deep_ep/wire/window.cuh>

namespace deep_ep {

// Numbers 0, 1, 2, ... divided among the warps that share a queue. A warp asks for the next one while the last is in
// use. In a team each begins with its own number, so that nobody waits for the first; then all who share the queue are
// of it.
class Claims {
 public:
  EP_DEVICE Claims(const Window& window, Queue queue, Team team = {})
      : counter_(&control(window, window.rank).claimed[static_cast<int>(queue)]),
        behind_(team.count),
        asked_(static_cast<uint32_t>(team.own - team.count)) {
    if (team.own < 0) ask();
  }

  // Collective over the warp.
  EP_DEVICE int take() {
    const int item = behind_ + static_cast<int>(device::shuffle(asked_, 0));
    ask();
    return item;
  }

 private:
  EP_DEVICE void ask() {
    if (device::lane_idx() == 0) asked_ = device::fetch_add_relaxed_gpu(counter_, 1u);
  }

  uint32_t* counter_;
  int behind_;      // of all that are asked for
  uint32_t asked_;  // lane 0's: the next one, without that
};

}  // namespace deep_ep
