// Waiting for others, and what is left behind when they do not come: a record that the host reads, and a kernel that
// drains. No printf (it costs stack), no trap (it would end the process's context for good).
#pragma once

#include <deep_ep/device/sm90/memory.cuh>
#include <deep_ep/device/sm90/thread.cuh>

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

// Nanoseconds of the GPU's own clock, the same for all its SMs; it moves in steps of up to a microsecond.
EP_DEVICE std::uint64_t clock_ns() {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

namespace detail {

// Looking at the clock and at the fault record (in host memory: a PCIe round trip) is for those who wait long.
inline constexpr int kPollsPerLook = 512;

// The first thread that gives up writes the record; the release of state 2 publishes its fields. The competitors are
// threads of this GPU, so its scope is enough for the exchange, and no PCIe atomics are asked for.
EP_DEVICE void record_wait(FaultRecord* record, const Waiting& waiting, std::uint32_t seen, std::uint64_t waited_ns) {
  if (compare_exchange_gpu(&record->state, 0u, 1u) != 0) return;
  record->phase = waiting.phase;
  record->block = block_idx();
  record->thread = thread_idx();
  record->peer = waiting.peer;
  record->expected = waiting.expected;
  record->seen = seen;
  record->waited_ns = waited_ns;
  store_release_sys(&record->state, 2u);
}

// Leaves word for whoever must not go by what this thread leaves undone. Always false.
EP_DEVICE bool give_up(const Patience& patience) {
  if (patience.gave_up != nullptr) store_relaxed_gpu(patience.gave_up, 1u);
  return false;
}

}  // namespace detail

// Records a fault that is no timeout: this thread saw something that must not be. All waits of this GPU give up soon.
EP_DEVICE void fault(const Patience& patience, const Waiting& waiting, std::uint32_t seen) {
  detail::record_wait(patience.fault, waiting, seen, 0);
  detail::give_up(patience);
}

// Polls `load() -> uint32_t` until it equals `waiting.expected`: true. False after the timeout, which it records, or
// soon after any thread of this GPU recorded a fault; then the caller drains: it starts no other wait and never uses
// what did not arrive. Orders what `load` orders.
template <class Load>
EP_DEVICE bool wait_until_equals(const Patience& patience, const Waiting& waiting, Load load) {
  std::uint32_t seen = load();
  if (seen == waiting.expected) return true;
  const std::uint64_t start_ns = clock_ns();
  std::uint64_t limit_ns = patience.notice_ns != 0 ? patience.notice_ns : patience.timeout_ns;
  while (true) {
#pragma unroll 1
    for (int poll = 0; poll < detail::kPollsPerLook; ++poll) {
      seen = load();
      if (seen == waiting.expected) return true;
    }
    if (load_relaxed_sys(&patience.fault->state) != 0) return detail::give_up(patience);
    const std::uint64_t waited_ns = clock_ns() - start_ns;
    if (limit_ns == 0 || waited_ns < limit_ns) continue;
    const bool gives_up = limit_ns == patience.timeout_ns;
    detail::record_wait(patience.fault + (gives_up ? 0 : 1), waiting, seen, waited_ns);
    if (gives_up) return detail::give_up(patience);
    limit_ns = patience.timeout_ns;
  }
}

// A wait for threads of this GPU that are bound to come; `what` names it in the simulator's reports.
template <class Predicate>
EP_DEVICE void wait_until([[maybe_unused]] const char* what, Predicate predicate) {
  while (!predicate()) {
  }
}

// Programmatic dependent launch. The next kernel of the stream may start once all blocks said this (or ended); ...
EP_DEVICE void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ... it waits here until the kernels before it have ended and their memory is visible.
EP_DEVICE void wait_for_prerequisites() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace deep_ep::device
