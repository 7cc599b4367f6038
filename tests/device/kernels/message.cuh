// Block 0 of each rank sends `count` rounds of 32 words to block 1 of its peer, one warp each, and waits for an
// acknowledgement of every round. How the words are announced is the variant; each one is enough to order them.
#pragma once

#include "probe.cuh"

namespace deep_ep {

enum Announcement { kReleaseGpu, kReleaseSys, kAddRelease, kFetchAdd, kCompareExchange, kFences, kPairs, kRelaxed };

struct alignas(8) FlaggedWord {
  uint32_t value, epoch;
};

template <ProbeConfig C>
EP_DEVICE void announce(uint32_t* flag, uint32_t round) {
  namespace d = device;
  if constexpr (C.variant == kReleaseGpu) d::store_release_gpu(flag, round);
  if constexpr (C.variant == kReleaseSys) d::store_release_sys(flag, round);
  if constexpr (C.variant == kAddRelease) d::add_release_sys(flag, 1);
  if constexpr (C.variant == kFetchAdd) d::fetch_add_acq_rel_sys(flag, 1);
  if constexpr (C.variant == kCompareExchange) d::compare_exchange_sys(flag, round - 1, round);
  if constexpr (C.variant == kFences) {
    d::fence_sys();
    d::store_relaxed_sys(flag, round);
  }
  if constexpr (C.variant == kRelaxed) d::store_relaxed_sys(flag, round);  // wrong
}

template <ProbeConfig C>
EP_DEVICE void await(uint32_t* flag, uint32_t round) {
  namespace d = device;
  if constexpr (C.variant == kFences) {
    d::wait_until("message", [&] { return d::load_relaxed_sys(flag) == round; });
    d::fence_sys();
  } else {
    d::wait_until("message", [&] { return d::load_acquire_sys(flag) == round; });
  }
}

template <ProbeConfig C>
EP_DEVICE void message(const ProbeArgs& args) {
  namespace d = device;
  const int lane = d::lane_idx();
  const bool is_sender = d::block_idx() == 0;
  unsigned char* mailbox = is_sender ? args.peer : args.window;  // words at 0, flag at 512, acknowledgement at 640
  auto* words = reinterpret_cast<uint32_t*>(mailbox);
  auto* pairs = reinterpret_cast<FlaggedWord*>(mailbox);
  auto* flag = reinterpret_cast<uint32_t*>(mailbox + 512);
  auto* taken = reinterpret_cast<uint32_t*>(mailbox + 640);
  for (int round = 1; round <= args.count; ++round) {
    const uint32_t value = args.input[lane] + round;
    uint32_t* out = args.output + (round - 1) * 32 + lane;
    if constexpr (C.variant == kPairs) {  // every word carries its own flag: nothing else orders it
      if (is_sender) {
        d::store_relaxed_sys(pairs + lane, {value, static_cast<uint32_t>(round)});
      } else {
        FlaggedWord word;
        d::wait_until("pair", [&] {
          word = d::load_relaxed_sys(pairs + lane);
          return word.epoch == static_cast<uint32_t>(round);
        });
        *out = word.value;
      }
    } else if (is_sender) {
      words[lane] = value;
      d::sync_warp();
      if (lane == 0) announce<C>(flag, round);
    } else {
      if (lane == 0) await<C>(flag, round);
      d::sync_warp();
      *out = words[lane];
    }
    d::sync_warp();
    if (lane == 0) {
      if (is_sender) {
        d::wait_until("acknowledgement", [&] { return d::load_acquire_sys(taken) == static_cast<uint32_t>(round); });
      } else {
        d::store_release_sys(taken, round);
      }
    }
    d::sync_warp();
  }
}

}  // namespace deep_ep
