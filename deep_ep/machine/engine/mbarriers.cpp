// Mbarriers: arrivals of threads and bytes of bulk loads, counted per phase.
#include <deep_ep/device/sim/bulk.cuh>

#include "copies.hpp"
#include "memory.hpp"
#include "scheduler.hpp"
#include "watch.hpp"

namespace deep_ep::sim {
namespace {

void end_phase_if_complete(MbarrierState& state, device::Mbarrier* barrier) {
  if (state.pending != 0 || state.bytes != 0) return;
  state.parity ^= 1;
  state.pending = state.arrivals;
  state.is_seen[state.parity] = false;
  notify(barrier, sizeof *barrier);
}

void arrive(device::Mbarrier& barrier, int bytes, const Site& site, void* pc) {
  scheduler.current().site = site;
  scheduler.preempt();
  MbarrierState& state = state_of(barrier, site);
  tsan::note_read(&barrier, sizeof barrier, pc);
  if (bytes < 0) scheduler.fail(site, "an mbarrier is to expect " + std::to_string(bytes) + " bytes");
  if (state.pending == 0) {
    scheduler.fail(site, "an mbarrier of " + std::to_string(state.arrivals) +
                             " arrivals gets one more while its phase waits for bytes");
  }
  state.tokens[state.parity].release();
  state.bytes += bytes;
  --state.pending;
  end_phase_if_complete(state, &barrier);
}

bool test(device::Mbarrier& barrier, std::uint32_t parity, const Site& site, void* pc) {
  MbarrierState& state = state_of(barrier, site);
  tsan::note_read(&barrier, sizeof barrier, pc);
  watch(&barrier);
  const std::uint32_t ended = parity & 1;
  if (state.parity == ended) return false;
  state.tokens[ended].acquire();
  if (!state.is_seen[ended]) {  // the thread has seen copies complete, so copies that it issues come after them
    state.is_seen[ended] = true;
    Block& block = *scheduler.current().block;
    for (const Side side : {kSharedSide, kGlobalSide}) tell(block.engines[side], state.copies[ended][side]);
  }
  return true;
}

}  // namespace

MbarrierState& state_of(device::Mbarrier& barrier, const Site& site) {
  Block& block = *scheduler.current().block;
  const auto found = block.mbarriers.find(&barrier);
  if (found == block.mbarriers.end()) {
    scheduler.fail(site, "an mbarrier that nobody initialised: " + describe(&barrier, sizeof barrier));
  }
  return *found->second;
}

void complete_bytes(MbarrierState& state, device::Mbarrier* barrier, int num_bytes, const tsan::Line& shared,
                    const tsan::Line& global) {
  const std::uint32_t parity = state.parity;
  const std::array<const tsan::Line*, kNumSides> lines = {&shared, &global};
  for (const Side side : {kSharedSide, kGlobalSide}) {
    lines[side]->enter();
    state.tokens[parity].release();
    state.copies[parity][side].release();
  }
  state.bytes -= num_bytes;
  end_phase_if_complete(state, barrier);
}

std::string describe_mbarrier(const Block& block, const void* barrier) {
  for (const auto& [address, state] : block.mbarriers) {
    if (address != barrier) continue;
    return std::to_string(state->pending) + " of " + std::to_string(state->arrivals) + " arrivals and " +
           std::to_string(state->bytes) + " bytes outstanding in its phase of parity " + std::to_string(state->parity);
  }
  return "not initialised";
}

}  // namespace deep_ep::sim

namespace deep_ep::device {

using sim::scheduler;

void mbarrier_init(Mbarrier& barrier, int arrivals, sim::Site site) {
  sim::Fiber& fiber = scheduler.current();
  fiber.site = site;
  scheduler.preempt();
  const sim::Region* region = sim::find_region(&barrier, sizeof barrier);
  if (region == nullptr || region->owner != fiber.block || reinterpret_cast<std::uintptr_t>(&barrier) % 8 != 0) {
    scheduler.fail(site, "an mbarrier must be 8 aligned bytes of the block's shared memory, not " +
                             sim::describe(&barrier, sizeof barrier));
  }
  if (arrivals < 1) scheduler.fail(site, "an mbarrier of " + std::to_string(arrivals) + " arrivals");
  sim::tsan::note_write(&barrier, sizeof barrier, __builtin_return_address(0));
  auto& state = fiber.block->mbarriers[&barrier];
  if (state != nullptr) scheduler.fail(site, "this mbarrier was initialised before, at " + sim::name_of(state->site));
  state = std::make_unique<sim::MbarrierState>();
  state->arrivals = state->pending = arrivals;
  state->initialiser = &fiber;
  state->site = site;
}

void fence_mbarrier_init(sim::Site site) {
  sim::Fiber& fiber = scheduler.current();
  fiber.site = site;
  for (auto& [address, state] : fiber.block->mbarriers) {
    if (state->initialiser == &fiber) state->is_fenced = true;
  }
}

void mbarrier_arrive(Mbarrier& barrier, sim::Site site) { sim::arrive(barrier, 0, site, __builtin_return_address(0)); }

void mbarrier_arrive_expect(Mbarrier& barrier, int bytes, sim::Site site) {
  sim::arrive(barrier, bytes, site, __builtin_return_address(0));
}

bool mbarrier_test(Mbarrier& barrier, std::uint32_t parity, sim::Site site) {
  scheduler.current().site = site;
  scheduler.preempt();
  return sim::test(barrier, parity, site, __builtin_return_address(0));
}

void mbarrier_wait(Mbarrier& barrier, std::uint32_t parity, sim::Site site) {
  void* pc = __builtin_return_address(0);
  while (true) {
    sim::begin_poll(site);
    if (sim::test(barrier, parity, site, pc)) break;
    sim::park_poll({"mbarrier", site});
  }
  sim::end_poll();
}

}  // namespace deep_ep::device
