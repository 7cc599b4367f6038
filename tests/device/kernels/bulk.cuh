// Rows of 256 bytes pass through shared memory: loaded, every word raised by one, stored. Each warp has two stages, so
// that it waits for all but the latest group before it takes a stage again.
#pragma once

#include "probe.cuh"

namespace deep_ep {

enum BulkVariant { kReadWait, kFullWait, kTestWait };

inline constexpr int kRowBytes = 256, kStageBytes = kRowBytes + 128;

template <ProbeConfig C>
EP_DEVICE void bulk(const ProbeArgs& args) {
  namespace d = device;
  const int lane = d::lane_idx(), num_warps = d::num_blocks() * d::num_warps();
  auto* stages = d::shared_memory<char>(d::warp_idx() * 2 * kStageBytes);
  const auto barrier = [&](int stage) -> d::Mbarrier& {
    return *reinterpret_cast<d::Mbarrier*>(stages + stage * kStageBytes + kRowBytes);
  };
  if (d::elect()) {
    d::mbarrier_init(barrier(0), 1);
    d::mbarrier_init(barrier(1), 1);
    d::fence_mbarrier_init();
  }
  d::sync_warp();
  int turn = 0;
  for (int row = d::block_idx() * d::num_warps() + d::warp_idx(); row < args.count; row += num_warps, ++turn) {
    const int stage = turn % 2;
    auto* words = reinterpret_cast<uint32_t*>(stages + stage * kStageBytes);
    if (d::elect()) {
      if constexpr (C.variant == kFullWait) {
        d::bulk_wait<1>();
      } else {
        d::bulk_wait_read<1>();
      }
      d::mbarrier_arrive_expect(barrier(stage), kRowBytes);
      d::bulk_load(words, args.input + row * (kRowBytes / 4), kRowBytes, barrier(stage));
    }
    d::sync_warp();
    const uint32_t parity = turn / 2 % 2;
    if constexpr (C.variant == kTestWait) {
      d::wait_until("row", [&] { return d::mbarrier_test(barrier(stage), parity); });
    } else {
      d::mbarrier_wait(barrier(stage), parity);
    }
    for (int i = lane; i < kRowBytes / 4; i += 32) words[i] += 1;
    d::fence_async_proxy_shared();
    d::sync_warp();
    if (d::elect()) {
      auto* to = args.output + row * (kRowBytes / 4);
      d::bulk_store(to, words, kRowBytes / 2);  // a group of two
      d::bulk_store(to + kRowBytes / 8, words + kRowBytes / 8, kRowBytes / 2);
      d::bulk_commit();
    }
    d::sync_warp();
  }
  if (d::elect()) d::bulk_wait<0>();
  d::sync_warp();
}

}  // namespace deep_ep
