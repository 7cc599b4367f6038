// Waits with a timeout. Thread 0 of each block waits for a word of its own that nobody writes (variant 0) or that
// block 0 writes after a while (variant 1).
#pragma once

#include "probe.cuh"

namespace deep_ep {

template <ProbeConfig C>
EP_DEVICE void patience(const ProbeArgs& args) {
  namespace d = device;
  auto* fault = reinterpret_cast<d::FaultRecord*>(args.window);
  auto* word = reinterpret_cast<uint32_t*>(args.window + 128);
  if (C.variant == 1 && global_thread_idx() == 32) {
    const uint64_t start_ns = d::clock_ns();
    while (d::clock_ns() - start_ns < 1000) {
    }
    d::store_release_gpu(word, 3u);
  }
  if (d::thread_idx() == 0) {
    const bool came = d::wait_until_equals({fault, 1'000'000}, {.phase = 4, .peer = 9, .expected = 3u},
                                           [&] { return d::load_acquire_gpu(word); });
    args.output[d::block_idx()] = came ? 1 : 2;
  }
}

}  // namespace deep_ep
