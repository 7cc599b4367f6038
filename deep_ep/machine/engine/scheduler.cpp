#include "scheduler.hpp"

#include <algorithm>

#include "copies.hpp"

namespace deep_ep::sim {
namespace {

constexpr std::uint64_t kMaxSteps = 400'000'000;
constexpr std::uint64_t kStepNs = 10;

}  // namespace

Scheduler scheduler;

Climate draw_climate(Random& random, int num_ranks) {
  Climate climate;
  climate.preemption = random.uniform() * random.uniform();
  climate.agents = random.uniform() * random.uniform() + 0.001;
  climate.slowness = 1 - random.uniform() * 0.2;
  switch (random.below(3)) {
    case 0:
      climate.slow_rank = static_cast<int>(random.below(num_ranks));
      break;
    case 1:
      climate.slow_warps = 0.25;
      break;
    default:
      break;
  }
  climate.elects_apart = random.chance(0.5);
  climate.slow_lanes = climate.elects_apart ? 0.3 * random.uniform() : 0;
  return climate;
}

void Scheduler::reset(std::uint64_t seed, int num_ranks) {
  random = Random(seed);
  climate = draw_climate(random, num_ranks);
  ready_.clear();
  delayed_.clear();
  current_ = nullptr;
  home_ = tsan::Line::current();
  num_unfinished_ = 0;
  is_stopped_ = false;
  now_ns = num_steps = progress_ = 0;
  failure_.clear();
}

void Scheduler::add(Fiber& fiber, std::uint64_t start_ns) {
  ++num_unfinished_;
  if (start_ns > 0) {
    delayed_.emplace_back(now_ns + start_ns, &fiber);
  } else {
    wake(fiber);
  }
}

Ending Scheduler::run() {
  is_stopped_ = false;
  leave();
  if (!failure_.empty()) return Ending::kFailed;
  if (is_stopped_) return Ending::kStopped;
  return num_unfinished_ == 0 ? Ending::kAllDone : Ending::kStuck;
}

// Runs on the stack of whoever leaves, so a fiber costs one switch, not two. Returns when the leaver's turn has come.
void Scheduler::leave() {
  while (true) {
    if (is_stopped_ || !failure_.empty()) return switch_to(nullptr);
    if (++num_steps > kMaxSteps) {
      failure_ = "no end in sight after " + std::to_string(kMaxSteps) + " steps";
      continue;
    }
    now_ns += kStepNs;
    start_delayed();
    if (has_copies() && (ready_.empty() || random.chance(climate.agents))) {
      advance_a_copy();
    } else if (!ready_.empty()) {
      return switch_to(pick());
    } else if (!delayed_.empty()) {
      now_ns = std::min_element(delayed_.begin(), delayed_.end())->first;
    } else {
      return switch_to(nullptr);
    }
  }
}

void Scheduler::start_delayed() {
  for (std::size_t i = 0; i < delayed_.size();) {
    if (delayed_[i].first > now_ns) {
      ++i;
      continue;
    }
    wake(*delayed_[i].second);
    delayed_[i] = delayed_.back();
    delayed_.pop_back();
  }
}

Fiber* Scheduler::pick() {
  Fiber* fiber = ready_[random.below(ready_.size())];
  if (fiber->is_slow && random.chance(climate.slowness)) fiber = ready_[random.below(ready_.size())];
  return fiber;
}

// nullptr stands for whoever called run().
void Scheduler::switch_to(Fiber* next) {
  if (next == current_) return;
  void** saved = current_ == nullptr ? &main_resume_ : &current_->resume;
  void* resumed = next == nullptr ? main_resume_ : next->resume;
  current_ = next;
  enter_current();
  deep_ep_switch_stack(saved, resumed);
}

void Scheduler::enter_current() const {
  if (current_ == nullptr) {
    enter_home();
  } else {
    current_->line.enter();
  }
}

void Scheduler::preempt() {
  if (current_->is_polling) return;
  if (random.chance(climate.preemption)) leave();
}

void Scheduler::sleep(const Wait& wait) {
  Fiber& fiber = *current_;
  fiber.wait = wait;
  if (wait.waiting != nullptr) fiber.waiting = *wait.waiting;
  // Swaps with the last in the list; order there means nothing, chance picks.
  Fiber* last = ready_.back();
  ready_[fiber.ready_idx] = last;
  last->ready_idx = fiber.ready_idx;
  ready_.pop_back();
  fiber.ready_idx = -1;
  leave();
  fiber.wait.what = nullptr;
}

void Scheduler::wake(Fiber& fiber) {
  if (fiber.ready_idx >= 0) return;
  fiber.ready_idx = static_cast<int>(ready_.size());
  ready_.push_back(&fiber);
}

void Scheduler::finish() {
  current_->is_done = true;
  --num_unfinished_;
  note_progress();
  sleep({"nothing", current_->site});
  __builtin_unreachable();  // a recycled fiber starts again at the top of its stack
}

void Scheduler::fail(const Site& site, const std::string& what) {
  fail_launch(what + "\n  " + name_of(*current_) + " at " + name_of(site));
}

void Scheduler::fail_launch(const std::string& what) {
  failure_ = what;
  leave();
  __builtin_unreachable();  // run() returned and the fiber is given up
}

}  // namespace deep_ep::sim
