// Waiting for others, and what is left behind when they do not come: a record that the host reads, and a kernel that
// drains. Time is virtual: it moves with the engine's steps, and jumps when a launch is told to let waits expire.
#pragma once

#include <deep_ep/device/sim/memory.cuh>
#include <deep_ep/device/sim/thread.cuh>

namespace deep_ep::device {

// Who waited for whom in vain. In memory that the host can read, and zero while all is well.
struct FaultRecord {
  std::uint32_t state;  // 0 none, 1 being written, 2 readable by whoever acquires the 2
  std::uint32_t phase;
  std::int32_t block, thread, peer;
  std::uint32_t expected, seen;
  std::uint32_t reserved;
  std::uint64_t waited_ns;
};
static_assert(sizeof(FaultRecord) == 40 && EP_OFFSET(FaultRecord, waited_ns) == 32, "the host reads it by offsets");

// How long to wait, and where to complain.
struct Patience {
  FaultRecord* fault;        // [2]: the fault; behind it a notice of who waits long, and goes on waiting
  std::uint64_t timeout_ns;  // 0: forever, or until another thread's fault
  std::uint64_t notice_ns;   // less than the timeout; 0: never
  std::uint32_t* gave_up;    // in this GPU's memory, or null: set once a wait has ended in vain
};

// What a wait is for.
struct Waiting {
  std::uint32_t phase;
  std::int32_t peer;
  std::uint32_t expected;
};

// Virtual nanoseconds since the launch.
std::uint64_t clock_ns();

// Nothing to do: launches of the simulated machine do not overlap.
EP_DEVICE void launch_dependents() {}
EP_DEVICE void wait_for_prerequisites() {}

}  // namespace deep_ep::device

namespace deep_ep::sim {

inline constexpr std::uint64_t kNever = ~std::uint64_t{0};

// What a parked thread waits for, for reports.
struct Wait {
  const char* what;
  Site site;
  const device::Waiting* waiting = nullptr;  // with the word last seen, in a wait for one
  std::uint32_t seen = 0;
  std::uint64_t deadline_ns = kNever;
};

// Between the two no other thread runs, and the engine notes which words are loaded.
void begin_poll(const Site& site);
void end_poll();

// Ends a poll that found nothing: sleeps until one of the words it loaded changes. False once the deadline has passed.
bool park_poll(const Wait& wait);

}  // namespace deep_ep::sim

namespace deep_ep::device {

namespace detail {

// The first thread that gives up writes the record; the release of state 2 publishes its fields.
EP_DEVICE void record_wait(FaultRecord* record, const Waiting& waiting, std::uint32_t seen, std::uint64_t waited_ns,
                           const sim::Site& site) {
  if (compare_exchange_gpu(&record->state, 0u, 1u, site) != 0) return;
  record->phase = waiting.phase;
  record->block = block_idx();
  record->thread = thread_idx();
  record->peer = waiting.peer;
  record->expected = waiting.expected;
  record->seen = seen;
  record->waited_ns = waited_ns;
  store_release_sys(&record->state, 2u, site);
}

// Leaves word for whoever must not go by what this thread leaves undone. Always false.
EP_DEVICE bool give_up(const Patience& patience, const sim::Site& site) {
  if (patience.gave_up != nullptr) store_relaxed_gpu(patience.gave_up, 1u, site);
  return false;
}

}  // namespace detail

// Records a fault that is no timeout: this thread saw something that must not be. All waits of this GPU give up soon.
EP_DEVICE void fault(const Patience& patience, const Waiting& waiting, std::uint32_t seen,
                     sim::Site site = sim::Site::current()) {
  detail::record_wait(patience.fault, waiting, seen, 0, site);
  detail::give_up(patience, site);
}

// Polls `load() -> uint32_t` until it equals `waiting.expected`: true. False after the timeout, which it records, or
// soon after any thread of this GPU recorded a fault; then the caller drains: it starts no other wait and never uses
// what did not arrive. Orders what `load` orders.
template <class Load>
EP_DEVICE bool wait_until_equals(const Patience& patience, const Waiting& waiting, Load load,
                                 sim::Site site = sim::Site::current()) {
  const std::uint64_t start_ns = clock_ns();
  std::uint64_t limit_ns = patience.notice_ns != 0 ? patience.notice_ns : patience.timeout_ns;
  while (true) {
    sim::begin_poll(site);
    const std::uint32_t seen = load();
    const bool has_arrived = seen == waiting.expected;
    const bool is_over = has_arrived || load_relaxed_sys(&patience.fault->state, site) != 0;
    if (is_over) {
      sim::end_poll();
      return has_arrived || detail::give_up(patience, site);
    }
    const std::uint64_t deadline_ns = limit_ns == 0 ? sim::kNever : start_ns + limit_ns;
    if (sim::park_poll({"a word", site, &waiting, seen, deadline_ns})) continue;
    const bool gives_up = limit_ns == patience.timeout_ns;
    detail::record_wait(patience.fault + (gives_up ? 0 : 1), waiting, seen, clock_ns() - start_ns, site);
    if (gives_up) return detail::give_up(patience, site);
    limit_ns = patience.timeout_ns;
  }
}

// A wait for threads of this GPU that are bound to come; `what` names it in reports.
template <class Predicate>
EP_DEVICE void wait_until(const char* what, Predicate predicate, sim::Site site = sim::Site::current()) {
  while (true) {
    sim::begin_poll(site);
    if (predicate()) break;
    sim::park_poll({what, site});
  }
  sim::end_poll();
}

}  // namespace deep_ep::device
