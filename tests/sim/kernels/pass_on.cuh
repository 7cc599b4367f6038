// A word passed on by plain stores and loads, the store in one launch, the load in a later one of the right neighbour:
// nothing but what lies between the two launches can order them.
#pragma once

#include <deep_ep/wire/window.cuh>

namespace deep_ep {

struct PassOnConfig {};

struct PassOnArgs {
  Window window;
  uint32_t value;  // for the right neighbour
  uint32_t* seen;  // null, or where what the left one has left goes; then nothing is passed on
};

template <PassOnConfig C>
EP_DEVICE void pass_on(const PassOnArgs& a) {
  if (device::thread_idx() != 0) return;
  if (a.seen == nullptr) {
    control(a.window, (a.window.rank + 1) % a.window.num_ranks).reserved[0] = a.value;
  } else {
    *a.seen = control(a.window, a.window.rank).reserved[0];
  }
}

}  // namespace deep_ep
