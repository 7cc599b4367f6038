#pragma once
// What a source tells each peer before its tokens arrive, as words (word.cuh):
//
//   0                      tokens that come
//   then, [local expert]   selections of the receiver's experts

#include <deep_ep/limits.cuh>

namespace deep_ep::message_word {

constexpr int kTokens = 0;
constexpr int kExperts = 1;

}  // namespace deep_ep::message_word
