// Every token goes to the rank that its target names, beside a row of metadata; each rank ends up with [source rank]
// [slot] tokens. Small, but it needs every kind of order at once: the planted bugs each take one away.
#pragma once

#include <deep_ep/device/device.cuh>

namespace deep_ep {

struct ExchangeConfig {
  int num_ranks, num_tokens, token_bytes;
  constexpr int slot_bytes() const { return token_bytes + 128; }
};

struct ExchangeArgs {
  const char* x;         // [num_tokens, token_bytes]
  const int* target;     // [num_tokens]
  const int* slot;       // [num_tokens]
  char* recv[2];         // of each rank: [num_ranks, num_tokens, slot_bytes]
  uint32_t* arrived[2];  // of each rank
  char* y;               // as recv, private
  device::FaultRecord* fault;
  uint64_t timeout_ns;
  int rank;
  int epoch;
};

template <ExchangeConfig C>
EP_DEVICE void send_tokens(const ExchangeArgs& args, char* stage, device::Mbarrier& full) {
  const int lane = device::lane_idx();
  uint32_t phase = 0;
  const int stride = device::num_blocks() * device::num_warps();
  for (int token = device::block_idx() * device::num_warps() + device::warp_idx(); token < C.num_tokens;
       token += stride) {
    if (device::elect()) {
#ifndef EP_BUG_NO_READ_WAIT
      device::bulk_wait_read<0>();  // the previous store has left the stage
#endif
      device::fence_async_proxy_shared();
      device::mbarrier_arrive_expect(full, C.token_bytes);
      device::bulk_load(stage, args.x + token * C.token_bytes, C.token_bytes, full);
    }
#ifndef EP_BUG_NO_SYNC_WARP
    device::sync_warp();
#endif
    reinterpret_cast<int*>(stage + C.token_bytes)[lane] = args.rank * C.num_tokens + token;
#ifndef EP_BUG_NO_PROXY_FENCE
    device::fence_async_proxy_shared();
#endif
    device::sync_warp();
    if (device::elect()) {
#ifndef EP_BUG_NO_MBARRIER_WAIT
      device::mbarrier_wait(full, phase);
#endif
      const long slot = args.rank * C.num_tokens + args.slot[token];
      device::bulk_store(args.recv[args.target[token]] + slot * C.slot_bytes(), stage, C.slot_bytes());
      device::bulk_commit();
    }
    phase ^= 1;
    device::sync_warp();
  }
  if (device::elect()) {
#ifdef EP_BUG_NO_BULK_WAIT
    device::bulk_wait_read<0>();
#else
    device::bulk_wait<0>();  // stores are visible before they are announced
#endif
  }
  device::sync_warp();
}

template <ExchangeConfig C>
EP_DEVICE bool announce_and_wait(const ExchangeArgs& args) {
  device::sync_block();
  if (device::thread_idx() < C.num_ranks) {
#ifdef EP_BUG_RELAXED
    device::add_relaxed_sys(args.arrived[device::thread_idx()], 1);
#else
    device::add_release_sys(args.arrived[device::thread_idx()], 1);
#endif
  }
  bool ok = true;
  if (device::warp_idx() == 0) {
    if (device::lane_idx() == 0) {
      const uint32_t expected = args.epoch * C.num_ranks * device::num_blocks();
      ok = device::wait_until_equals({args.fault, args.timeout_ns}, {.phase = 7, .peer = -1, .expected = expected},
                                     [&] { return device::load_acquire_sys(args.arrived[args.rank]); });
      *device::shared_memory<int>() = ok;
    }
    device::sync_warp();
  }
  device::sync_block();
  return *device::shared_memory<int>() != 0;
}

template <ExchangeConfig C>
EP_DEVICE void exchange(const ExchangeArgs& args) {
  char* stage = device::shared_memory<char>(128 + device::warp_idx() * (C.slot_bytes() + 128));
  auto& full = *reinterpret_cast<device::Mbarrier*>(stage + C.slot_bytes());
  if (device::elect()) {
    device::mbarrier_init(full, 1);
    device::fence_mbarrier_init();
  }
  device::sync_warp();
  send_tokens<C>(args, stage, full);
  if (!announce_and_wait<C>(args)) return;
  const int total = C.num_ranks * C.num_tokens * C.slot_bytes() / 16;
  auto* from = reinterpret_cast<const device::Vector16*>(args.recv[args.rank]);
  auto* to = reinterpret_cast<device::Vector16*>(args.y);
  for (int i = device::block_idx() * device::num_threads() + device::thread_idx(); i < total;
       i += device::num_blocks() * device::num_threads()) {
    device::store_streaming(to + i, device::load_streaming(from + i));
  }
}

}  // namespace deep_ep
