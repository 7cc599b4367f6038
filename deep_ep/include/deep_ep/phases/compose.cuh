#pragma once
// reads         topk_idx, positions, slots, weights and scale factors of one token
// writes        the token's tail in a stage
// waits for     nothing
// leaves behind (after fence and sync of the warp) a tail that the copy engine may take along

#include <deep_ep/device/device.cuh>
#include <deep_ep/wire/integers.cuh>
#include <deep_ep/wire/record.cuh>
#include <deep_ep/wire/routing.cuh>

namespace deep_ep {

// Scale factors of tokens: [tokens, count] of any strides, so they are moved one by one.
struct Scales {
  int32_t* words;                // null if there are none
  int64_t token_stride, stride;  // in words
  int32_t count;                 // of a token

  EP_DEVICE int32_t& at(int64_t token, int i) const { return words[token * token_stride + i * stride]; }
};

struct TokenTables {
  const int32_t* slots;      // [num_tokens, num_topk]
  const int32_t* positions;  // [num_tokens, num_topk], or null
  const float* weights;      // [num_tokens, num_topk], or null
  Scales scales;             // [num_tokens, count]
};

constexpr int kScalesAhead = 2;  // that a lane holds of a token: with one for every 128 values, 8192 values

// What lane k holds of a token: its selection and what goes with it. Loaded a token ahead, so nobody waits for it.
struct Choice {
  int expert = -1, slot = -1, position = -1;
  float weight = 0.0f;
  int32_t scales[kScalesAhead] = {};
};

EP_DEVICE Choice load_choice(const Routing& routing, const TokenTables& tables, int token, int end) {
  const int k = device::lane_idx();
  Choice choice;
  if (token >= end) return choice;
  if (k < routing.num_topk) {
    const int64_t entry = int64_t(token) * routing.num_topk + k;
    choice.expert = routing.expert(entry);
    choice.slot = tables.slots[entry];
    if (tables.positions != nullptr) choice.position = tables.positions[entry];
    if (tables.weights != nullptr) choice.weight = tables.weights[entry];
  }
  for (int j = 0; j < kScalesAhead; ++j) {
    if (k + 32 * j < tables.scales.count) choice.scales[j] = tables.scales.at(token, k + 32 * j);
  }
  return choice;
}

EP_DEVICE void compose_tail(const Routing& routing, const Scales& scales, int token, const Choice& choice, char* at) {
  const RoutingTail tail{reinterpret_cast<int32_t*>(at), routing.num_topk};
  const int k = device::lane_idx();
  if (k == 0) tail.token() = token;
  if (k < routing.num_topk) {
    tail.expert(k) = choice.expert;
    tail.position(k) = choice.position;
    tail.weight(k) = choice.weight;
  }
  for (int j = 0; j < kScalesAhead; ++j) {
    if (k + 32 * j < scales.count) tail.scale(k + 32 * j) = choice.scales[j];
  }
  EP_NO_UNROLL
  for (int i = k + 32 * kScalesAhead; i < scales.count; i += 32) tail.scale(i) = scales.at(token, i);
}

}  // namespace deep_ep
