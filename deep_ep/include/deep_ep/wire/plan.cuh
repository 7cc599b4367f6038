#pragma once
// What every rank says of an operation. All but the last must be alike on all ranks. Ranks tell each other the values
// themselves, so that whoever differs can be told in which; deep_ep/ops/faults.py puts them into words.

#include <deep_ep/wire/record.cuh>
#include <deep_ep/wire/routing.cuh>
#include <deep_ep/wire/window.cuh>

namespace deep_ep {

// Operations.
constexpr uint32_t kDispatch = 1;
constexpr uint32_t kCombine = 2;
constexpr uint32_t kBarrier = 3;

// What changes the meaning of records and counts. What only this rank sees (SMs, alignment, layouts) is no part of it.
namespace plan_flag {
constexpr uint32_t kWeights = 1;   // weights travel
constexpr uint32_t kCached = 2;    // the routing is a handle's
constexpr uint32_t kScales = 4;    // rows carry scale factors
constexpr uint32_t kEveryRow = 8;  // combine sends each row of the expanded layout, not their sum
constexpr uint32_t kInPlace = 16;  // peers read rows where they lie
constexpr uint32_t kCpuSync = 32;  // ... and hosts wait in between: nobody may wait for the second launch in the first
}  // namespace plan_flag

struct Plan {
  uint32_t what, num_experts, max_tokens, row_bytes, tail_bytes, routes;
  uint32_t num_tokens;  // of the rank that says it

  EP_DEVICE uint32_t word(int item) const {
    if (item == 0) return what;
    if (item == 1) return num_experts;
    if (item == 2) return max_tokens;
    if (item == 3) return row_bytes;
    if (item == 4) return tail_bytes;
    return item == 5 ? routes : num_tokens;
  }
};

constexpr int kTokensItem = 6;

// The number of the routes that a dispatch finds: its epoch, on which buffer. All ranks that use the same handles
// agree.
constexpr int kEpochBits = 20;

EP_DEVICE uint32_t number_of_routes(const Window& window, uint32_t epoch) {
  return static_cast<uint32_t>(window.number) << kEpochBits | (epoch & ((1u << kEpochBits) - 1));
}

// `routes`: the number of the handle's, or 0 where there is no handle yet.
EP_DEVICE Plan plan_of(uint32_t operation, uint32_t flags, const Routing& routing, const Record& record,
                       uint32_t routes) {
  return {operation | flags << 8 | static_cast<uint32_t>(routing.num_topk) << 24,
          static_cast<uint32_t>(routing.num_experts),
          static_cast<uint32_t>(routing.max_tokens),
          static_cast<uint32_t>(record.row_bytes),
          static_cast<uint32_t>(record.tail_bytes),
          routes,
          static_cast<uint32_t>(routing.num_tokens)};
}

}  // namespace deep_ep
