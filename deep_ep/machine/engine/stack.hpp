// A stack of its own for every simulated thread, and the switch between two stacks.
#pragma once

#include <cstddef>

// Saves the registers that a function call must preserve on the current stack and where it ends in *saved, and goes on
// where `resumed` was saved. About 10 ns; ucontext takes 360 because it asks the kernel for the signal mask.
extern "C" void deep_ep_switch_stack(void** saved, void* resumed);

namespace deep_ep::sim {

class Stack {
 public:
  Stack();
  ~Stack();
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  // Returns what to resume in order to call `entry`, which never returns, at the top of this stack.
  void* prepare(void (*entry)());

 private:
  std::byte* mapping_;
};

}  // namespace deep_ep::sim
