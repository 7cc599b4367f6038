#pragma once
// Shared memory of one dispatch block, before the rings: what it counted and what the sources told it. plan.py reserves
// the same number of bytes (Tables::bytes there and here are compared by a test on both machines).

#include <deep_ep/device/device.cuh>
#include <deep_ep/limits.cuh>

namespace deep_ep {

// Whose waits: before it counts; of the warp that asks others; and what that has to learn.
enum class Ok { kCounts, kAgrees, kLearns };
constexpr int kOks = 3;

// Where a rank's rows are that are read in place, and what goes beside them, as this rank addresses them.
struct Found {
  const char* rows = nullptr;
  const char* beside = nullptr;
};

struct Tables {
  int* ok;            // [4]  0 once a wait of this block has failed, one word for each who may (Ok): then it drains
  int* expert_below;  // [num_experts]  selections by the blocks before this one; until look_back, by this block
  int* expert_total;  // [num_experts]  by all blocks
  int* rank_below;    // [kMaxRanks]    tokens bound for a rank, likewise
  int* rank_total;    // [kMaxRanks]
  int* tokens_of;     // [kMaxRanks]  what each source dispatches in all
  int* row_base;      // [kMaxRanks + 1]  first row of each source in the plain layout; the last is the number of rows
  int* expert_row;    // [num_experts = sources x local experts]  first expanded row of (source, local expert)
  int* coming;        // [num_experts]  of local experts: selections that come here
  Found* found;       // [kMaxRanks]  of each source, where rows are read in place

  static constexpr int bytes(int num_experts) {
    const int words = 4 + 4 * num_experts + 4 * kMaxRanks + 4 + kMaxRanks * int(sizeof(Found)) / 4;
    return (words * 4 + 127) / 128 * 128;
  }

  EP_DEVICE void open() const {
    if (device::thread_idx() < kOks) device::store_relaxed_gpu(ok + device::thread_idx(), 1);
  }
  EP_DEVICE bool are_all() const { return is(Ok::kCounts) && is(Ok::kAgrees) && is(Ok::kLearns); }
  EP_DEVICE void take_back(Ok what) const { device::store_relaxed_gpu(ok + static_cast<int>(what), 0); }
  EP_DEVICE bool is(Ok what) const { return device::load_relaxed_gpu(ok + static_cast<int>(what)) != 0; }

  EP_DEVICE static Tables at(int* words, int num_experts) {
    Tables tables;
    tables.ok = words;
    tables.expert_below = words + 4;
    tables.expert_total = tables.expert_below + num_experts;
    tables.rank_below = tables.expert_total + num_experts;
    tables.rank_total = tables.rank_below + kMaxRanks;
    tables.tokens_of = tables.rank_total + kMaxRanks;
    tables.row_base = tables.tokens_of + kMaxRanks;
    tables.expert_row = tables.row_base + kMaxRanks + 4;
    tables.coming = tables.expert_row + num_experts;
    tables.found = reinterpret_cast<Found*>(tables.coming + num_experts);
    return tables;
  }
};

}  // namespace deep_ep
