// Every order and scope of loads, stores and updates. All threads add to four counters of the window, twice over for
// 8 bytes; then they write what came back.
#pragma once

#include "probe.cuh"

namespace deep_ep {

struct alignas(8) Pair {
  uint32_t value, flag;
};

template <class T>
EP_DEVICE void probe_words(T* counters, T* own, T value, T* out) {
  namespace d = device;
  d::add_relaxed_gpu(counters + 0, value);
  d::add_release_gpu(counters + 0, value);
  d::add_relaxed_sys(counters + 0, value);
  d::add_release_sys(counters + 0, value);
  d::fetch_add_relaxed_gpu(counters + 1, value);
  d::fetch_add_relaxed_sys(counters + 1, value);
  d::fetch_add_acq_rel_gpu(counters + 1, value);
  d::fetch_add_acq_rel_sys(counters + 1, value);
  // A ticket of its own for every thread: the sum of all is known.
  out[0] = d::fetch_add_relaxed_gpu(counters + 2, 1);
  // Adds by comparing: retries until no one came between.
  T old = d::load_relaxed_gpu(counters + 3);
  while (true) {
    const T seen = d::compare_exchange_gpu(counters + 3, old, static_cast<T>(old + value));
    if (seen == old) break;
    old = seen;
  }
  old = d::load_relaxed_sys(counters + 3);
  while (true) {
    const T seen = d::compare_exchange_sys(counters + 3, old, static_cast<T>(old + value));
    if (seen == old) break;
    old = seen;
  }
  d::store_relaxed_gpu(own, value);
  out[1] = d::load_relaxed_gpu(own);
  d::store_relaxed_sys(own, value + 1);
  out[2] = d::load_relaxed_sys(own);
  d::store_release_gpu(own, value + 2);
  out[3] = d::load_acquire_gpu(own);
  d::store_release_sys(own, value + 3);
  out[4] = d::load_acquire_sys(own);
  d::store_streaming(own, value + 4);
  out[5] = d::load_streaming(own);
}

template <ProbeConfig C>
EP_DEVICE void words(const ProbeArgs& args) {
  const int i = global_thread_idx();
  const uint32_t value = args.input[i];
  auto* small = reinterpret_cast<uint32_t*>(args.window);
  auto* wide = reinterpret_cast<uint64_t*>(args.window + 64);
  auto* own = args.window + 128 + i * 32;
  uint32_t* out = args.output + i * 24;
  probe_words<uint32_t>(small, reinterpret_cast<uint32_t*>(own), value, out);
  uint64_t wide_out[6];
  probe_words<uint64_t>(wide, reinterpret_cast<uint64_t*>(own + 8), uint64_t{value} << 20, wide_out);
  for (int k = 0; k < 6; ++k) {
    out[6 + 2 * k] = static_cast<uint32_t>(wide_out[k]);
    out[7 + 2 * k] = static_cast<uint32_t>(wide_out[k] >> 32);
  }
  auto* vector = reinterpret_cast<device::Vector16*>(own + 16);
  device::store_streaming(vector, {value, value + 1, value + 2, value + 3});
  const device::Vector16 back = device::load_streaming(vector);
  out[18] = back.word[0] + back.word[1] + back.word[2] + back.word[3];
  auto* pair = reinterpret_cast<Pair*>(own);
  device::store_relaxed_sys(pair, {value, 7});
  out[19] = device::load_relaxed_sys(pair).value + device::load_relaxed_sys(pair).flag;
  auto* real = reinterpret_cast<float*>(own);
  device::store_release_gpu(real, 0.5f * value);
  out[20] = static_cast<uint32_t>(device::load_acquire_gpu(real) * 2);
  // Shared memory: loads and stores as above, and a counter of the block.
  int* shared = device::shared_memory<int>();
  if (device::thread_idx() == 0) device::store_relaxed_gpu(shared, 0);
  device::sync_block();
  out[21] = device::fetch_add_shared(shared, static_cast<int>(value % 7));
  device::sync_block();
  out[22] = device::load_acquire_gpu(shared);
  out[23] = 0;
}

}  // namespace deep_ep
