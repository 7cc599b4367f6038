#pragma once
// What a source tells each peer before its tokens arrive, as words (word.cuh):
//
//   0                      tokens that come
//   then                   what it calls (plan.cuh), in even and in odd epochs; the other words come in dispatches
//                          only; behind it, where what the receiver may read in place lies (in_place.cuh)
//   then, [local expert]   selections of the receiver's experts

#include <deep_ep/limits.cuh>

namespace deep_ep::message_word {

constexpr int kTokens = 0;
constexpr int kPlan = 1;
constexpr int kPlanWords = 7;
constexpr int kPlaceWords = 2;
constexpr int kSaidWords = kPlanWords + kPlaceWords;  // in one epoch
constexpr int kExperts = kPlan + 2 * kSaidWords;

}  // namespace deep_ep::message_word
