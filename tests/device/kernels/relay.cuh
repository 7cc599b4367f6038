// Rows travel: rank or block 0 writes them by ordinary stores, a copy engine takes them to the peer's window, the
// peer's copy engine brings them in. Between ordinary accesses and copies stand fences, also on the side that acquired.
#pragma once

#include "probe.cuh"

namespace deep_ep {

template <ProbeConfig C>
EP_DEVICE void relay(const ProbeArgs& args) {
  namespace d = device;
  constexpr int kBytes = 512;
  const int lane = d::lane_idx();
  auto* words = d::shared_memory<uint32_t>();
  auto& full = *d::shared_memory<d::Mbarrier>(kBytes);
  if (d::block_idx() == 0) {
    for (int i = lane; i < kBytes / 4; i += 32) words[i] = args.input[i] * 5;
    d::fence_async_proxy();
    d::sync_warp();
    if (d::elect()) {
      d::bulk_store(args.peer, words, kBytes);
      d::bulk_commit();
      d::bulk_wait<0>();
      d::store_release_sys(reinterpret_cast<uint32_t*>(args.peer + kBytes), 1);
    }
    d::sync_warp();
  } else {
    if (d::elect()) {
      d::mbarrier_init(full, 1);
      d::fence_mbarrier_init();
      d::wait_until("row", [&] { return d::load_acquire_sys(reinterpret_cast<uint32_t*>(args.window + kBytes)) == 1; });
#ifndef EP_BUG_NO_GLOBAL_FENCE
      d::fence_async_proxy_global();
#endif
      d::mbarrier_arrive_expect(full, kBytes);
      d::bulk_load(words, args.window, kBytes, full);
    }
    d::sync_warp();
    d::mbarrier_wait(full, 0);
    for (int i = lane; i < kBytes / 4; i += 32) args.output[i] = words[i];
  }
}

}  // namespace deep_ep
