// Kernels that are wrong, each in one way, for the tests of what the engine reports.
#pragma once

#include "probe.cuh"

namespace deep_ep {

enum Misuse {
  kDivergence,
  kDeadlock,
  kMissingArrival,
  kBarrierCount,
  kBulkOutOfBounds,
  kBulkMisaligned,
  kBulkSize,
  kPrefetchSize,
  kPrefetchOutOfBounds,
  kUnfencedMbarrier,
  kUninitialisedMbarrier,
  kOutOfBounds,
  kBeforeBegin,
  kAtomicOnShared,
  kUncommitted,
  kUnread,
  kPoison,
  kLoadUnderWay,
  kSmallOverrun,
  kArriveTwice,
  kMisalignedWord,
  kEndlessLoop,
};

template <ProbeConfig C>
EP_DEVICE void misuse(const ProbeArgs& args) {
  namespace d = device;
  auto* word = reinterpret_cast<uint32_t*>(args.window);
  auto* shared = d::shared_memory<unsigned char>();
  auto& barrier = *d::shared_memory<d::Mbarrier>(1024);
  const int thread = d::thread_idx();
  if constexpr (C.variant == kDivergence) {
    if (d::lane_idx() < 16) {
      d::sync_warp();  // here
    } else {
      d::ballot(true);  // or there
    }
  }
  if constexpr (C.variant == kDeadlock) {
    if (thread == 0) {
      d::FaultRecord* fault = reinterpret_cast<d::FaultRecord*>(args.window + 128);
      d::wait_until_equals({fault, 0}, {.phase = 3, .peer = 1, .expected = 5u},
                           [&] { return d::load_acquire_sys(word); });
    }
    d::sync_block();
  }
  if constexpr (C.variant == kMissingArrival) {
    if (thread == 0) d::mbarrier_init(barrier, 2);
    d::sync_block();
    if (thread == 0) d::mbarrier_arrive(barrier);
    d::mbarrier_wait(barrier, 0);
  }
  if constexpr (C.variant == kBarrierCount) d::sync_named(2, d::warp_idx() == 0 ? 64 : 32);
  if constexpr (C.variant == kArriveTwice) {
    d::arrive_named(2, 64);
    d::arrive_named(2, 64);
  }
  if (thread != 0) return;
  if constexpr (C.variant == kBulkOutOfBounds) d::bulk_store(args.window + 4096 - 16, shared, 32);
  if constexpr (C.variant == kBulkMisaligned) d::bulk_store(args.window + 8, shared, 32);
  if constexpr (C.variant == kBulkSize) d::bulk_store(args.window, shared, 24);
  if constexpr (C.variant == kPrefetchSize) d::bulk_prefetch(args.window, 24);
  if constexpr (C.variant == kPrefetchOutOfBounds) d::bulk_prefetch(args.window + 4096 - 16, 32);
  if constexpr (C.variant == kUnfencedMbarrier || C.variant == kLoadUnderWay) {
    d::mbarrier_init(barrier, 1);
    if constexpr (C.variant == kLoadUnderWay) d::fence_mbarrier_init();
    d::mbarrier_arrive_expect(barrier, 32);
    d::bulk_load(shared, args.window, 32, barrier);
  }
  if constexpr (C.variant == kUninitialisedMbarrier) d::mbarrier_arrive(barrier);
  if constexpr (C.variant == kOutOfBounds) args.output[args.count] = 1;
  if constexpr (C.variant == kBeforeBegin) args.output[-args.count] = 1;
  if constexpr (C.variant == kAtomicOnShared) d::add_relaxed_gpu(reinterpret_cast<uint32_t*>(shared), 1u);
  if constexpr (C.variant == kUncommitted) d::bulk_store(args.window, shared, 32);
  if constexpr (C.variant == kUnread) {
    d::bulk_store(args.window, shared, 32);
    d::bulk_commit();
  }
  if constexpr (C.variant == kPoison) args.output[0] = *reinterpret_cast<uint32_t*>(shared);
  if constexpr (C.variant == kSmallOverrun) reinterpret_cast<unsigned char*>(args.output)[args.count] = 1;
  if constexpr (C.variant == kEndlessLoop) {
    for (volatile int i = 0;; i = i + 1) {
    }
  }
  if constexpr (C.variant == kMisalignedWord) {
    d::load_relaxed_gpu(reinterpret_cast<uint32_t*>(args.window + 2));
  }
}

}  // namespace deep_ep
