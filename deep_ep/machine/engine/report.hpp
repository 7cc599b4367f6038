// What a person reads when a launch did not end well.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "model.hpp"

namespace deep_ep::sim {

// All fibers sleep: who waits for what, where; fibers that say the same are named together.
std::string describe_deadlock(const std::vector<Fiber*>& fibers);

// Prints what a signal (an access to no memory, a division by zero) interrupted, and ends the process.
void install_crash_reports();

}  // namespace deep_ep::sim
