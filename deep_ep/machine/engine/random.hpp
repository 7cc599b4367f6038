// The one source of chance of a launch: the same seed gives the same run.
#pragma once

#include <cstddef>
#include <cstdint>

namespace deep_ep::sim {

// SplitMix64.
class Random {
 public:
  explicit Random(std::uint64_t seed = 0) : state_(seed) {}

  std::uint64_t next() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  // 0 to end - 1.
  std::size_t below(std::size_t end) { return static_cast<std::size_t>((next() >> 32) * end >> 32); }
  // 0 to 1.
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  bool chance(double probability) { return uniform() < probability; }

 private:
  std::uint64_t state_;
};

}  // namespace deep_ep::sim
