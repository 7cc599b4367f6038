#pragma once
// Ranks that call different things, or the same with other sizes, must be told so, and not wait for each other forever.
//
// reads         what every source says that it calls
// writes        what this rank calls, at all ranks; a fault where one differs; each source's number of tokens
// waits for     the words of all sources
// leaves behind the certainty that all ranks make one call, or false
//
// A rank says it before anything else and whatever happens, so its peers hear of it even if it gives up at once. It may
// do so before it is admitted: the words of odd and of even epochs lie apart, and who has left the operation before has
// heard from all ranks there, so nobody listens to the one before that any more.

#include <deep_ep/phases/tables.cuh>
#include <deep_ep/wire/integers.cuh>
#include <deep_ep/wire/message.cuh>
#include <deep_ep/wire/phase.cuh>
#include <deep_ep/wire/plan.cuh>
#include <deep_ep/wire/window.cuh>
#include <deep_ep/wire/word.cuh>

namespace deep_ep {

EP_DEVICE uint64_t* plan_word(const Window& window, uint32_t epoch, int at, int from, int item) {
  return message(window, at, from) + message_word::kPlan + (epoch & 1) * message_word::kSaidWords + item;
}

// The first block of a call's first launch says it to all.
EP_DEVICE void propose(const Window& window, uint32_t epoch, const Plan& plan) {
  using message_word::kPlanWords;
  EP_NO_UNROLL
  for (int i = device::thread_idx(); i < window.num_ranks * kPlanWords; i += device::num_threads()) {
    const int rank = i / kPlanWords, item = i % kPlanWords;
    device::store_relaxed_sys(plan_word(window, epoch, rank, window.rank, item), word(plan.word(item), epoch));
  }
}

// Looks at what all sources say, a word a lane. Of several that differ the first is reported: it says most. Collective
// over the warp.
//
// `tokens_of`: null, or where each source's number of tokens goes.
EP_DEVICE bool agree(const Window& window, uint32_t epoch, const Plan& plan, const device::Patience& patience,
                     int* tokens_of = nullptr) {
  using message_word::kPlanWords;
  const int lane = device::lane_idx(), num_words = window.num_ranks * kPlanWords;
  bool all_agree = true;
  EP_NO_UNROLL
  for (int first = 0; all_agree && first < num_words; first += 32) {
    const int i = first + lane, source = i / kPlanWords, item = i % kPlanWords;
    const uint32_t mine = plan.word(item);
    int said = static_cast<int>(mine);
    bool came = true;
    if (i < num_words) {
      const uint64_t* at = plan_word(window, epoch, window.rank, source, item);
      came = await_word(at, epoch, patience, phase::kAgree, source, said);
    }
    if (tokens_of != nullptr && i < num_words && item == kTokensItem) tokens_of[source] = said;
    const uint32_t theirs = static_cast<uint32_t>(said);
    const uint32_t differing = device::ballot(came && theirs != mine && item != kTokensItem);
    if (differing != 0 && lane == lowest_bit(differing)) {
      const uint32_t where = phase::kDiffer | static_cast<uint32_t>(item) << phase::kItemShift;
      device::fault(patience, {.phase = where, .peer = source, .expected = mine}, theirs);
    }
    all_agree = device::all(came) && differing == 0;
  }
  return all_agree;
}

}  // namespace deep_ep
