#include "copies.hpp"

#include <algorithm>
#include <cstring>
#include <memory>

#include "memory.hpp"
#include "scheduler.hpp"
#include "watch.hpp"

namespace deep_ep::sim {
namespace {

struct Copy {
  bool is_load = false;
  bool has_read = false;
  std::byte* destination = nullptr;
  const std::byte* source = nullptr;
  int num_bytes = 0;
  device::Mbarrier* barrier = nullptr;  // of a load
  MbarrierState* barrier_state = nullptr;
  BulkGroup* group = nullptr;  // of a store
  Fiber* issuer = nullptr;
  Site site;
  void* pc = nullptr;
  int lane = 0;
  std::array<tsan::Token, kNumSides> known;  // what each side knew of earlier accesses when the copy was issued
  std::vector<std::byte> data;               // between the two moments

  Side source_side() const { return is_load ? kGlobalSide : kSharedSide; }
  Side destination_side() const { return is_load ? kSharedSide : kGlobalSide; }
  tsan::Line& line(Side side) const { return issuer->block->engines[side].lanes[lane]; }
};

std::vector<std::unique_ptr<Copy>> under_way;

constexpr std::array<const char*, kNumSides> kSideNames = {"shared", "global"};

// The first two lanes are for loads, the others for stores.
constexpr int kLanesPerKind = CopyEngine::kNumLanes / 2;

void name_lane(Block& block, Side side, int lane) {
  const std::string name = "copy engine of rank " + std::to_string(block.grid->rank) + " block " +
                           std::to_string(block.idx) + ", " + kSideNames[side] + " side, " +
                           (lane < kLanesPerKind ? "loads" : "stores");
  block.engines[side].lanes[lane].name(name.c_str());
}

// The lines of execution that a copy on this lane needs, at its block's first such copy.
void make_lines(Block& block, int lane) {
  if (!tsan::is_on() || block.engines[kSharedSide].lanes[lane].exists()) return;
  scheduler.enter_home();  // a new line knows what its creator knows: nothing of this launch
  for (const Side side : {kSharedSide, kGlobalSide}) {
    CopyEngine& engine = block.engines[side];
    if (!engine.teller.exists()) engine.teller.name("what a copy engine was told");
    name_lane(block, side, lane);
  }
  scheduler.enter_current();
}

// Runs `action` in a line of execution other than the running fiber's.
template <class Action>
void in_line(const tsan::Line& line, Action action) {
  if (!tsan::is_on()) return;
  line.enter();
  action();
  scheduler.enter_current();
}

void check_range(const char* what, const void* address, int num_bytes, Side side, const Fiber& fiber,
                 const Site& site) {
  const Region* region = find_region(address, num_bytes);
  if (region == nullptr) {
    scheduler.fail(site, std::string("a bulk copy's ") + what + " is out of bounds: " + describe(address, num_bytes));
  }
  const bool is_right_side = side == kSharedSide ? region->owner == fiber.block : region->owner == nullptr;
  if (!is_right_side) {
    scheduler.fail(site, std::string("a bulk copy's ") + what + " is not in " +
                             (side == kSharedSide ? "this block's shared" : "global") +
                             " memory: " + describe(address, num_bytes));
  }
  if (reinterpret_cast<std::uintptr_t>(address) % 16 != 0) {
    scheduler.fail(site,
                   std::string("a bulk copy's ") + what + " is not a multiple of 16: " + describe(address, num_bytes));
  }
}

void check_size(int num_bytes, const Site& site) {
  if (num_bytes > 0 && num_bytes % 16 == 0) return;
  scheduler.fail(
      site, "a bulk copy or prefetch of " + std::to_string(num_bytes) + " bytes; sizes are positive multiples of 16");
}

// A copy by the running fiber; the caller adds where its completion counts.
Copy& issue(bool is_load, void* destination, const void* source, int num_bytes, const Site& site, void* pc) {
  Fiber& fiber = scheduler.current();
  fiber.site = site;
  scheduler.preempt();
  check_size(num_bytes, site);
  // A new one each time: tokens of an old one would remember what another block's engine knew.
  under_way.push_back(std::make_unique<Copy>());
  Copy& copy = *under_way.back();
  copy.is_load = is_load;
  copy.destination = static_cast<std::byte*>(destination);
  copy.source = static_cast<const std::byte*>(source);
  copy.num_bytes = num_bytes;
  copy.issuer = &fiber;
  copy.site = site;
  copy.pc = pc;
  copy.lane = (is_load ? 0 : kLanesPerKind) + static_cast<int>(scheduler.random.below(kLanesPerKind));
  check_range("source", source, num_bytes, copy.source_side(), fiber, site);
  check_range("destination", destination, num_bytes, copy.destination_side(), fiber, site);
  make_lines(*fiber.block, copy.lane);
  for (const Side side : {kSharedSide, kGlobalSide}) {
    CopyEngine& engine = fiber.block->engines[side];
    in_line(engine.teller, [&] {
      engine.told.acquire();
      copy.known[side].release();
    });
  }
  return copy;
}

void read_source(Copy& copy) {
  const Side side = copy.source_side();
  in_line(copy.line(side), [&] {
    copy.known[side].acquire();
    tsan::note_read(copy.source, copy.num_bytes, copy.pc);
    if (copy.group == nullptr) return;
    copy.group->read.release();
    copy.group->copies[side].release();
  });
  copy.data.assign(copy.source, copy.source + copy.num_bytes);
  copy.has_read = true;
  if (copy.group != nullptr) --copy.group->unread;
}

void write_destination(Copy& copy) {
  const Side side = copy.destination_side();
  in_line(copy.line(side), [&] {
    copy.known[side].acquire();
    tsan::note_write(copy.destination, copy.num_bytes, copy.pc);
    if (copy.group == nullptr) return;
    copy.group->written.release();
    copy.group->copies[side].release();
  });
  std::memcpy(copy.destination, copy.data.data(), copy.num_bytes);
  notify(copy.destination, copy.num_bytes);
  if (copy.is_load) {
    complete_bytes(*copy.barrier_state, copy.barrier, copy.num_bytes, copy.line(kSharedSide), copy.line(kGlobalSide));
    scheduler.enter_current();
  } else {
    --copy.group->unwritten;
  }
}

BulkGroup& open_group(Fiber& fiber) {
  if (fiber.open_group == nullptr) fiber.open_group = std::make_unique<BulkGroup>();
  return *fiber.open_group;
}

// Waits until `is_ready` holds for all but the `num_latest` latest groups; then calls `see` for each of them.
template <class IsReady, class See>
void wait_for_groups(int num_latest, const char* what, const Site& site, IsReady is_ready, See see) {
  Fiber& fiber = scheduler.current();
  const auto num_awaited = static_cast<std::ptrdiff_t>(fiber.groups.size()) - num_latest;
  begin_poll(site);
  while (
      !std::all_of(fiber.groups.begin(), fiber.groups.begin() + std::max<std::ptrdiff_t>(0, num_awaited), is_ready)) {
    watch(&fiber);
    sleep_until_notified({what, site});
    begin_poll(site);
  }
  end_poll();
  for (std::ptrdiff_t i = 0; i < num_awaited; ++i) see(*fiber.groups[i]);
}

}  // namespace

void rename_lines(Block& block) {
  for (const Side side : {kSharedSide, kGlobalSide}) {
    for (int lane = 0; lane < CopyEngine::kNumLanes; ++lane) {
      if (block.engines[side].lanes[lane].exists()) name_lane(block, side, lane);
    }
  }
}

bool has_copies() { return !under_way.empty(); }

void advance_a_copy() {
  const std::size_t idx = scheduler.random.below(under_way.size());
  Copy& copy = *under_way[idx];
  Fiber* issuer = copy.issuer;
  if (!copy.has_read) {
    read_source(copy);
  } else {
    write_destination(copy);
    std::swap(under_way[idx], under_way.back());
    under_way.pop_back();
  }
  notify(issuer, 1);  // it may wait for this group
}

void check_leaving(const Fiber& fiber) {
  if (fiber.open_group != nullptr) {
    scheduler.fail(fiber.site, "a thread leaves the kernel with bulk stores that it never committed");
  }
  for (const auto& copy : under_way) {
    if (copy->is_load && fiber.block->num_running == 0 && copy->issuer->block == fiber.block) {
      scheduler.fail(copy->site,
                     "the block leaves the kernel while this bulk load is under way into its shared memory");
    }
    if (!copy->is_load && copy->issuer == &fiber && !copy->has_read) {
      scheduler.fail(copy->site, "a thread leaves the kernel before its bulk store has read shared memory");
    }
  }
}

void complete_copies_of(const Grid& grid) {
  const auto left = std::stable_partition(under_way.begin(), under_way.end(),
                                          [&](const auto& copy) { return copy->issuer->block->grid != &grid; });
  for (auto at = left; at != under_way.end(); ++at) {
    if (!(*at)->has_read) read_source(**at);
    write_destination(**at);
  }
  under_way.erase(left, under_way.end());
}

void forget_copies() { under_way.clear(); }

void tell(CopyEngine& engine, tsan::Token& token) {
  if (!engine.teller.exists()) return;  // no copy was issued yet, so there is nothing to tell
  in_line(engine.teller, [&] {
    token.acquire();
    engine.told.release();
  });
}

}  // namespace deep_ep::sim

namespace deep_ep::device {

using sim::scheduler, sim::kSharedSide, sim::kGlobalSide;

void bulk_load(void* shared, const void* global, int bytes, Mbarrier& barrier, sim::Site site) {
  sim::MbarrierState& state = sim::state_of(barrier, site);
  if (!state.is_fenced) {
    scheduler.fail(site,
                   "the copy engine cannot see this mbarrier yet: run fence_mbarrier_init after the "
                   "mbarrier_init at " +
                       sim::name_of(state.site));
  }
  sim::tsan::note_read(&barrier, sizeof barrier, __builtin_return_address(0));
  sim::Copy& copy = sim::issue(/*is_load=*/true, shared, global, bytes, site, __builtin_return_address(0));
  copy.barrier = &barrier;
  copy.barrier_state = &state;
}

void bulk_prefetch(const void* global, int bytes, sim::Site site) {
  sim::Fiber& fiber = scheduler.current();
  fiber.site = site;
  sim::check_size(bytes, site);
  sim::check_range("source", global, bytes, kGlobalSide, fiber, site);
}

void bulk_store(void* global, const void* shared, int bytes, sim::Site site) {
  sim::Copy& copy = sim::issue(/*is_load=*/false, global, shared, bytes, site, __builtin_return_address(0));
  copy.group = &sim::open_group(*copy.issuer);
  ++copy.group->unread;
  ++copy.group->unwritten;
}

void bulk_commit(sim::Site site) {
  sim::Fiber& fiber = scheduler.current();
  fiber.site = site;
  sim::open_group(fiber);  // a group may be empty
  fiber.groups.push_back(std::move(fiber.open_group));
  scheduler.preempt();
}

void detail::wait_for_reads(int num_latest, const sim::Site& site) {
  sim::wait_for_groups(
      num_latest, "bulk stores to have read", site, [](const auto& group) { return group->unread == 0; },
      [](sim::BulkGroup& group) {
        group.read.acquire();
        sim::tell(scheduler.current().block->engines[kSharedSide], group.copies[kSharedSide]);
      });
}

void detail::wait_for_writes(int num_latest, const sim::Site& site) {
  sim::Fiber& fiber = scheduler.current();
  const std::size_t num_before = fiber.groups.size();
  sim::wait_for_groups(
      num_latest, "bulk stores", site, [](const auto& group) { return group->unwritten == 0; },
      [&](sim::BulkGroup& group) {
        group.read.acquire();
        group.written.acquire();
        for (const auto side : {kSharedSide, kGlobalSide}) sim::tell(fiber.block->engines[side], group.copies[side]);
      });
  const std::size_t num_kept = std::min<std::size_t>(num_before, num_latest);
  fiber.groups.erase(fiber.groups.begin(), fiber.groups.end() - static_cast<std::ptrdiff_t>(num_kept));
}

void fence_async_proxy_shared(sim::Site site) {
  scheduler.current().site = site;
  scheduler.preempt();
  scheduler.current().block->engines[kSharedSide].told.release();
}

void fence_async_proxy_global(sim::Site site) {
  scheduler.current().site = site;
  scheduler.preempt();
  scheduler.current().block->engines[kGlobalSide].told.release();
}

void fence_async_proxy(sim::Site site) {
  fence_async_proxy_shared(site);
  scheduler.current().block->engines[kGlobalSide].told.release();
}

}  // namespace deep_ep::device
