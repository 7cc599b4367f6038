// From a list of kernels to a finished launch, or a report.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace deep_ep::sim {

struct LaunchRequest {
  std::string kernel;  // path of the shared object
  std::string entry;
  std::string args;
  std::int32_t rank = 0;
  std::int32_t num_blocks = 0;
  std::int32_t num_threads = 0;
  std::int32_t shared_bytes = 0;
  std::int32_t cluster_blocks = 1;
  std::uint64_t start_ns = 0;
  bool in_order = false;  // starts when the request before it of the same rank has ended, as in a CUDA stream
};

struct Report {
  bool is_ok = false;
  std::string text;  // what went wrong
  std::uint64_t num_steps = 0;
  std::uint64_t virtual_ns = 0;
};

// `lets_expire`: when nothing else can move, the clock jumps to the next deadline of a wait; else that is a deadlock.
// Throws std::runtime_error for a request that cannot be launched.
Report launch(const std::vector<LaunchRequest>& requests, std::uint64_t seed, bool lets_expire);

}  // namespace deep_ep::sim
