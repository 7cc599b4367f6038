// Other values for a tensor, by plain stores: what a layer's own kernels do to registered memory between two calls.
#pragma once

#include <deep_ep/device/device.cuh>

namespace deep_ep {

struct RewriteConfig {};

struct RewriteArgs {
  uint32_t* to;
  const uint32_t* values;
  int32_t num_words;
};

template <RewriteConfig C>
EP_DEVICE void rewrite(const RewriteArgs& a) {
  EP_NO_UNROLL
  for (int i = device::thread_idx(); i < a.num_words; i += device::num_threads()) a.to[i] = a.values[i];
}

}  // namespace deep_ep
