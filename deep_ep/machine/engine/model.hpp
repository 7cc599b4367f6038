// The nouns of a launch: fibers (threads of the GPU) in warps in blocks in grids. All of them are recycled between
// launches; reset() forgets the last one.
#pragma once

#include <deep_ep/device/sim/bulk.cuh>
#include <deep_ep/device/sim/time.cuh>

#include <array>
#include <bitset>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "stack.hpp"
#include "tsan.hpp"

namespace deep_ep::sim {

inline constexpr int kWarpThreads = 32;
inline constexpr int kMaxBlockThreads = 1024;

struct Fiber;
struct Block;

// The two kinds of memory, as the copy engine and its fences tell them apart.
enum Side { kSharedSide, kGlobalSide, kNumSides };

// Threads that wait for each other: the last of `expected` arrivals opens it for all.
struct Rendezvous {
  int expected = 0;
  int arrived = 0;
  std::uint64_t generation = 0;
  std::array<tsan::Token, 2> tokens;  // of the even and the odd generations
  std::vector<Fiber*> sleepers;

  void reset(int num_threads) {
    expected = num_threads;
    arrived = 0;
    sleepers.clear();
  }
};

struct Warp {
  Rendezvous meeting;
  const char* what = nullptr;  // what the first lane to arrive is doing, and where
  Site site;
  int elected_lane = 0;
  bool is_slow = false;
  std::array<std::array<std::uint64_t, kWarpThreads>, 2> values;  // that the lanes brought, by parity of the meeting
};

struct NamedBarrier {
  Rendezvous meeting;
  Site site;                              // of the first thread to arrive
  std::bitset<kMaxBlockThreads> arrived;  // in the current generation
};

// What the engine knows of a device::Mbarrier.
struct MbarrierState {
  int arrivals = 0;  // of a phase
  int pending = 0;   // still to come in this one
  std::int64_t bytes = 0;
  std::uint32_t parity = 0;
  bool is_fenced = false;
  Fiber* initialiser = nullptr;
  Site site;
  std::array<tsan::Token, 2> tokens;                         // released by arrivals and copies, by parity
  std::array<std::array<tsan::Token, kNumSides>, 2> copies;  // released by the copies only
  std::array<bool, 2> is_seen = {};  // whether the block's copy engine has been told of those copies
};

// Bulk stores that one thread committed together.
struct BulkGroup {
  int unread = 0;                             // copies that have not read their source
  int unwritten = 0;                          // copies that are not complete
  tsan::Token read, written;                  // released by the copies at these two moments
  std::array<tsan::Token, kNumSides> copies;  // the same, each side on its own
};

// The copy engine of a block, one per side: what it has been told, and lines of execution for its copies.
struct CopyEngine {
  static constexpr int kNumLanes = 4;  // two for loads, two for stores
  tsan::Token told;                    // by fences, by threads that saw copies complete, and by the launch
  tsan::Line teller;  // acquires `told` when a copy is issued: what comes later is unknown to that copy
  std::array<tsan::Line, kNumLanes> lanes;
};

// One kernel on one rank.
struct Grid {
  int rank = 0;
  int num_blocks = 0;
  int num_threads = 0;
  int cluster_blocks = 1;
  int shared_bytes = 0;
  int num_running = 0;  // threads that have not left the kernel
  std::uint64_t start_ns = 0;
  void (*entry)(const void* args) = nullptr;
  const void* args = nullptr;
  tsan::Token* before = nullptr;  // of what this grid's stream did earlier
  std::vector<std::unique_ptr<Rendezvous>> clusters;
};

struct Block {
  Grid* grid = nullptr;
  int idx = 0;
  std::byte* shared = nullptr;
  int shared_bytes = 0;
  int num_running = 0;  // threads that have not left the kernel
  std::vector<std::unique_ptr<Warp>> warps;
  std::array<NamedBarrier, 16> barriers;
  std::unordered_map<device::Mbarrier*, std::unique_ptr<MbarrierState>> mbarriers;
  std::array<CopyEngine, kNumSides> engines;
};

struct Fiber {
  Block* block = nullptr;
  Warp* warp = nullptr;
  int thread = 0;
  int lane = 0;

  Stack stack;
  void* resume = nullptr;
  tsan::Line line;

  bool is_done = false;
  bool is_slow = false;     // in this seed's climate
  bool is_polling = false;  // see begin_poll
  bool is_expired = false;  // its deadline has passed
  int ready_idx = -1;       // in the scheduler's list; -1 while it sleeps
  Wait wait = {nullptr, {}};
  device::Waiting waiting = {};  // a copy of *wait.waiting
  Site site;                     // of the last primitive
  std::vector<std::uintptr_t> watched;
  std::vector<const void*> loaded;  // words read by relaxed loads since the last fence

  std::unique_ptr<BulkGroup> open_group;           // of stores that are not committed yet
  std::vector<std::unique_ptr<BulkGroup>> groups;  // committed, oldest first

  int rank() const { return block->grid->rank; }
};

// "rank 0 block 1 thread 33"
std::string name_of(const Fiber& fiber);

// "shared memory of rank 0 block 1"
std::string name_of(const Block& block);

// "deep_ep/include/deep_ep/phases/count.cuh:34"
std::string name_of(const Site& site);

}  // namespace deep_ep::sim
