// Threads that meet: warps, named barriers, clusters. And the questions that a thread asks about itself.
#include <deep_ep/device/sim/group.cuh>
#include <deep_ep/device/sim/thread.cuh>
#include <deep_ep/device/sim/warp.cuh>

#include <algorithm>

#include "scheduler.hpp"

namespace deep_ep::sim {
namespace {

// The generation that this arrival belongs to. Only what orders memory touches the tokens.
std::uint64_t arrive(Rendezvous& meeting, bool orders_memory) {
  const std::uint64_t generation = meeting.generation;
  if (orders_memory) meeting.tokens[generation % 2].release();
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    ++meeting.generation;
    scheduler.note_progress();
    for (Fiber* fiber : meeting.sleepers) scheduler.wake(*fiber);
    meeting.sleepers.clear();
  }
  return generation;
}

void wait(Rendezvous& meeting, std::uint64_t generation, bool orders_memory, const Wait& wait) {
  while (meeting.generation == generation) {
    meeting.sleepers.push_back(&scheduler.current());
    scheduler.sleep(wait);
  }
  if (orders_memory) meeting.tokens[generation % 2].acquire();
}

using Values = std::array<std::uint64_t, kWarpThreads>;

// All lanes bring a value and see everybody's. Values of two meetings are kept: a lane that has not read the last ones
// has not come to the next meeting either, so nobody can be two ahead.
const Values& meet_in_warp(const char* what, std::uint64_t value, const Site& site, bool orders_memory = false) {
  Fiber& fiber = scheduler.current();
  fiber.site = site;
  scheduler.preempt();
  Warp& warp = *fiber.warp;
  if (warp.meeting.arrived == 0) {
    warp.what = what;
    warp.site = site;
  } else if (warp.site.line() != site.line() || warp.site.column() != site.column() || warp.what != what) {
    scheduler.fail(site, std::string("collective diverges: ") + warp.what + " at " + name_of(warp.site) + " vs " +
                             what + " at " + name_of(site));
  }
  Values& values = warp.values[warp.meeting.generation % 2];
  values[fiber.lane] = value;
  const std::uint64_t generation = arrive(warp.meeting, orders_memory);
  wait(warp.meeting, generation, orders_memory, {what, site});
  return values;
}

std::uint64_t arrive_at_barrier(int id, int num_threads, const Site& site) {
  Fiber& fiber = scheduler.current();
  fiber.site = site;
  scheduler.preempt();
  if (num_threads <= 0 || num_threads % kWarpThreads != 0 || num_threads > fiber.block->grid->num_threads) {
    scheduler.fail(site, "a barrier of " + std::to_string(num_threads) + " threads in a block of " +
                             std::to_string(fiber.block->grid->num_threads) + "; it takes whole warps of the block");
  }
  NamedBarrier& barrier = fiber.block->barriers[id];
  Rendezvous& meeting = barrier.meeting;
  if (meeting.arrived == 0) {
    meeting.expected = num_threads;
    barrier.site = site;
    barrier.arrived.reset();
  } else if (meeting.expected != num_threads) {
    scheduler.fail(site, "barrier " + std::to_string(id) + " is for " + std::to_string(meeting.expected) +
                             " threads at " + name_of(barrier.site) + " and for " + std::to_string(num_threads) +
                             " at " + name_of(site));
  }
  if (barrier.arrived[fiber.thread]) {
    scheduler.fail(site, "barrier " + std::to_string(id) + ": this thread arrives twice at the same meeting");
  }
  barrier.arrived[fiber.thread] = true;
  return arrive(meeting, /*orders_memory=*/true);
}

void check_barrier_id(int id, const Site& site) {
  if (id < 1 || id > 15) scheduler.fail(site, "barrier id " + std::to_string(id) + "; ids are 1 to 15");
}

const Fiber& self() { return scheduler.current(); }
const Grid& grid() { return *self().block->grid; }

}  // namespace
}  // namespace deep_ep::sim

namespace deep_ep::device {

using sim::kWarpThreads, sim::meet_in_warp;

int block_idx() { return sim::self().block->idx; }
int num_blocks() { return sim::grid().num_blocks; }
int thread_idx() { return sim::self().thread; }
int num_threads() { return sim::grid().num_threads; }
int warp_idx() { return sim::self().thread / kWarpThreads; }
int num_warps() { return sim::grid().num_threads / kWarpThreads; }
int lane_idx() { return sim::self().lane; }

std::byte* detail::shared_memory_at(int byte_offset, const sim::Site& site) {
  const sim::Block& block = *sim::self().block;
  if (byte_offset < 0 || byte_offset > block.shared_bytes) {
    sim::scheduler.fail(site, "offset " + std::to_string(byte_offset) + " of shared memory; the block has " +
                                  std::to_string(block.shared_bytes) + " bytes");
  }
  return block.shared + byte_offset;
}

bool elect(sim::Site site) {
  if (sim::scheduler.climate.elects_apart) {
    sim::scheduler.current().site = site;
    sim::scheduler.preempt();
  } else {
    meet_in_warp("elect", 0, site);
  }
  return sim::self().lane == sim::self().warp->elected_lane;
}

void sync_warp(sim::Site site) { meet_in_warp("sync_warp", 0, site, /*orders_memory=*/true); }

std::uint32_t ballot(bool predicate, sim::Site site) {
  const auto& values = meet_in_warp("ballot", predicate, site);
  std::uint32_t mask = 0;
  for (int lane = 0; lane < kWarpThreads; ++lane) mask |= static_cast<std::uint32_t>(values[lane]) << lane;
  return mask;
}

bool any(bool predicate, sim::Site site) { return ballot(predicate, site) != 0; }
bool all(bool predicate, sim::Site site) { return ballot(predicate, site) == ~0u; }

std::uint64_t detail::shuffle_bits(std::uint64_t bits, int lane, const sim::Site& site) {
  return meet_in_warp("shuffle", bits, site)[lane & (kWarpThreads - 1)];
}

std::uint32_t detail::match_bits(std::uint64_t bits, const sim::Site& site) {
  const auto& values = meet_in_warp("match_any", bits, site);
  std::uint32_t mask = 0;
  for (int lane = 0; lane < kWarpThreads; ++lane) mask |= static_cast<std::uint32_t>(values[lane] == bits) << lane;
  return mask;
}

int reduce_add(int value, sim::Site site) {
  std::uint32_t sum = 0;  // wraps around, as the hardware's does
  for (const std::uint64_t other : meet_in_warp("reduce_add", static_cast<std::uint32_t>(value), site)) {
    sum += static_cast<std::uint32_t>(other);
  }
  return static_cast<int>(sum);
}

int reduce_max(int value, sim::Site site) {
  int largest = value;
  for (const std::uint64_t other : meet_in_warp("reduce_max", static_cast<std::uint32_t>(value), site)) {
    largest = std::max(largest, static_cast<int>(static_cast<std::uint32_t>(other)));
  }
  return largest;
}

int inclusive_sum(int value, sim::Site site) {
  const auto& values = meet_in_warp("inclusive_sum", static_cast<std::uint32_t>(value), site);
  std::uint32_t sum = 0;
  for (int lane = 0; lane <= sim::self().lane; ++lane) sum += static_cast<std::uint32_t>(values[lane]);
  return static_cast<int>(sum);
}

void sync_block(sim::Site site) {
  const std::uint64_t generation = sim::arrive_at_barrier(0, num_threads(), site);
  sim::wait(sim::self().block->barriers[0].meeting, generation, /*orders_memory=*/true, {"sync_block", site});
}

void sync_named(int id, int num_threads, sim::Site site) {
  static constexpr std::array<const char*, 16> kNames = {
      "",          "barrier 1", "barrier 2",  "barrier 3",  "barrier 4",  "barrier 5",  "barrier 6",  "barrier 7",
      "barrier 8", "barrier 9", "barrier 10", "barrier 11", "barrier 12", "barrier 13", "barrier 14", "barrier 15"};
  sim::check_barrier_id(id, site);
  const std::uint64_t generation = sim::arrive_at_barrier(id, num_threads, site);
  sim::wait(sim::self().block->barriers[id].meeting, generation, /*orders_memory=*/true, {kNames[id], site});
}

void arrive_named(int id, int num_threads, sim::Site site) {
  sim::check_barrier_id(id, site);
  sim::arrive_at_barrier(id, num_threads, site);
}

void sync_cluster(sim::Site site) {
  sim::scheduler.current().site = site;
  sim::scheduler.preempt();
  sim::Rendezvous& meeting = *sim::grid().clusters[cluster_idx()];
  const std::uint64_t generation = sim::arrive(meeting, /*orders_memory=*/true);
  sim::wait(meeting, generation, /*orders_memory=*/true, {"sync_cluster", site});
}

int cluster_num_blocks() { return sim::grid().cluster_blocks; }
int cluster_idx() { return block_idx() / cluster_num_blocks(); }
int cluster_block_idx() { return block_idx() % cluster_num_blocks(); }

}  // namespace deep_ep::device
