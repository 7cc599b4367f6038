#pragma once
// Ranks that call different things, or the same with other sizes, must be told so, and not wait for each other forever.
//
// reads         what every source says that it calls
// writes        what this rank calls, at all ranks; a fault where one differs
// waits for     the words of all sources
// leaves behind the certainty that all ranks make one call, or false
//
// A rank says it before anything else and whatever happens, so its peers hear of it even if it gives up at once. It may
// do so before it is admitted: the words of odd and of even epochs lie apart, and who has left the operation before has
// heard from all ranks there, so nobody listens to the one before that any more.

#include <deep_ep/wire/message.cuh>
#include <deep_ep/wire/phase.cuh>
#include <deep_ep/wire/plan.cuh>
#include <deep_ep/wire/window.cuh>
#include <deep_ep/wire/word.cuh>

namespace deep_ep {

EP_DEVICE uint64_t* plan_word(const Window& window, uint32_t epoch, int at, int from, int item) {
  return message(window, at, from) + message_word::kPlan + (epoch & 1) * message_word::kPlanWords + item;
}

// One sending block says it to all.
EP_DEVICE void propose(const Window& window, uint32_t epoch, const Plan& plan) {
  using message_word::kPlanWords;
  EP_NO_UNROLL
  for (int i = device::thread_idx(); i < window.num_ranks * kPlanWords; i += device::num_threads()) {
    const int rank = i / kPlanWords, item = i % kPlanWords;
    device::store_relaxed_sys(plan_word(window, epoch, rank, window.rank, item), word(plan.word(item), epoch));
  }
}

// What a source says; false if it never did.
EP_DEVICE bool hear(const Window& window, uint32_t epoch, const device::Patience& patience, int source, int item,
                    int& said) {
  return await_word(plan_word(window, epoch, window.rank, source, item), epoch, patience, phase::kAgree, source, said);
}

// Records that a source differs in an item. It may in earlier ones too, and the earliest says most.
EP_DEVICE void complain(const Window& window, uint32_t epoch, const Plan& plan, const device::Patience& patience,
                        int source, int item) {
  EP_NO_UNROLL
  for (int earlier = 0; earlier <= item; ++earlier) {
    int said = 0;
    if (!hear(window, epoch, patience, source, earlier, said)) return;
    const uint32_t mine = plan.word(earlier), theirs = static_cast<uint32_t>(said);
    if (theirs == mine) continue;
    const uint32_t where = phase::kDiffer | static_cast<uint32_t>(earlier) << phase::kItemShift;
    return device::fault(patience, {.phase = where, .peer = source, .expected = mine}, theirs);
  }
}

// Looks at words first, first + step, ... of those that all sources say together.
EP_DEVICE bool agree(const Window& window, uint32_t epoch, const Plan& plan, const device::Patience& patience,
                     int first, int step) {
  using message_word::kPlanWords;
  EP_NO_UNROLL
  for (int i = first; i < window.num_ranks * kPlanWords; i += step) {
    const int source = i / kPlanWords, item = i % kPlanWords;
    int said = 0;
    const bool came = hear(window, epoch, patience, source, item, said);
    if (came && static_cast<uint32_t>(said) == plan.word(item)) continue;
    if (came) complain(window, epoch, plan, patience, source, item);
    return false;
  }
  return true;
}

}  // namespace deep_ep
