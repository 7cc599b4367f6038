#pragma once
// reads         topk_idx, positions, slots and weights of one token
// writes        the token's tail in a stage
// waits for     nothing
// leaves behind (after fence and sync of the warp) a tail that the copy engine may take along

#include <deep_ep/device/device.cuh>
#include <deep_ep/wire/integers.cuh>
#include <deep_ep/wire/record.cuh>
#include <deep_ep/wire/routing.cuh>

namespace deep_ep {

struct TokenTables {
  const int32_t* slots;      // [num_tokens, num_topk]
  const int32_t* positions;  // [num_tokens, num_topk], or null
  const float* weights;      // [num_tokens, num_topk], or null
};

// What lane k holds of a token: its selection and what goes with it. Loaded a token ahead, so nobody waits for it.
struct Choice {
  int expert, slot, position;
  float weight;
};

EP_DEVICE Choice load_choice(const Routing& routing, const TokenTables& tables, int token, int end) {
  const int k = device::lane_idx();
  if (token >= end || k >= routing.num_topk) return {-1, -1, -1, 0.0f};
  const int64_t entry = int64_t(token) * routing.num_topk + k;
  return {routing.expert(entry), tables.slots[entry], tables.positions != nullptr ? tables.positions[entry] : -1,
          tables.weights != nullptr ? tables.weights[entry] : 0.0f};
}

EP_DEVICE void compose_tail(const Routing& routing, int token, const Choice& choice, char* at) {
  const RoutingTail tail{reinterpret_cast<int32_t*>(at), routing.num_topk};
  const int k = device::lane_idx();
  if (k == 0) tail.token() = token;
  if (k < routing.num_topk) {
    tail.expert(k) = choice.expert;
    tail.position(k) = choice.position;
    tail.weight(k) = choice.weight;
  }
}

}  // namespace deep_ep
