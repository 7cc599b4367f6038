// Who runs next. One operating-system thread runs all fibers; a fiber stops where a primitive lets it, and chance
// decides who goes on: another fiber, or an agent of a copy engine.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model.hpp"
#include "random.hpp"

namespace deep_ep::sim {

// How a seed behaves; drawn once a launch, so that a swarm of seeds sees very different machines.
struct Climate {
  double preemption = 0;      // chance that a primitive lets others run first
  double agents = 0;          // chance that the copy engines move before a fiber does
  double slowness = 0;        // chance that a slow fiber's turn goes to someone else
  int slow_rank = -1;         // all of whose fibers are slow
  double slow_warps = 0;      // share of warps that are slow
  bool elects_apart = false;  // elect() lets lanes go on before the others have come: it orders no memory
  double slow_lanes = 0;      // share of lanes that are slow
};
Climate draw_climate(Random& random, int num_ranks);

enum class Ending { kAllDone, kFailed, kStuck, kStopped };

class Scheduler {
 public:
  // Forgets the last launch. Fibers come by add().
  void reset(std::uint64_t seed, int num_ranks);
  void add(Fiber& fiber, std::uint64_t start_ns);

  // Runs until every fiber is done, something fails, all sleep, or a fiber asks to stop. Called outside of fibers; may
  // be called again.
  Ending run();

  // For the running fiber.
  Fiber& current() { return *current_; }
  bool in_fiber() const { return current_ != nullptr; }
  void preempt();                // perhaps lets others run first
  void sleep(const Wait& wait);  // until somebody wakes it
  [[noreturn]] void finish();
  [[noreturn]] void fail(const Site& site, const std::string& what);  // ends the launch
  [[noreturn]] void fail_launch(const std::string& what);             // the same, without naming the fiber

  void wake(Fiber& fiber);
  void stop() { is_stopped_ = true; }    // run() is to return at the running fiber's next switch
  void note_progress() { ++progress_; }  // something changed that a sleeper might wait for

  Random random;
  Climate climate;
  std::uint64_t now_ns = 0;
  std::uint64_t num_steps = 0;
  std::uint64_t progress() const { return progress_; }
  const std::string& failure() const { return failure_; }

  // The tsan line in which fibers are created and launches begin and end.
  void enter_home() const { tsan::Line::enter(home_); }
  void enter_current() const;

 private:
  void leave();  // gives the processor to whoever is next
  void start_delayed();
  Fiber* pick();
  void switch_to(Fiber* next);

  std::vector<Fiber*> ready_;
  std::vector<std::pair<std::uint64_t, Fiber*>> delayed_;
  Fiber* current_ = nullptr;
  void* main_resume_ = nullptr;
  void* home_ = nullptr;
  int num_unfinished_ = 0;
  bool is_stopped_ = false;
  std::uint64_t progress_ = 0;
  std::string failure_;
};

extern Scheduler scheduler;

}  // namespace deep_ep::sim
