#pragma once
// What a source tells each peer before its tokens arrive, as words (word.cuh):
//
//   0 .. kMaxBlocks        [block]: how many tokens the blocks before it send: where its slots start. Behind the last
//                          block that sends, all tokens.
//   then, [local expert]   selections of the receiver's experts

#include <deep_ep/limits.cuh>

namespace deep_ep::message_word {

constexpr int kStarts = 0;
constexpr int kExperts = kStarts + kMaxBlocks + 1;

}  // namespace deep_ep::message_word
