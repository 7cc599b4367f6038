#pragma once
// What a source tells each peer before its tokens arrive, as words (word.cuh):
//
//   0                      tokens that come
//   1                      blocks that send them
//   2 .. 2+kMaxBlocks      [block]: how many of those tokens the blocks before it send: where its slots start
//   then, [local expert]   selections of the receiver's experts

#include <deep_ep/limits.cuh>

namespace deep_ep::message_word {

constexpr int kTokens = 0;
constexpr int kBlocks = 1;
constexpr int kStarts = 2;
constexpr int kExperts = kStarts + kMaxBlocks;

}  // namespace deep_ep::message_word
