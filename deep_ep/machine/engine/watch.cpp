#include "watch.hpp"

#include <map>

#include "scheduler.hpp"

namespace deep_ep::sim {
namespace {

// By address rounded down to a word of 8 bytes. Fibers under the same word are in the order in which they fell asleep.
std::multimap<std::uintptr_t, Fiber*> sleepers;

std::uintptr_t word_of(const void* address) { return reinterpret_cast<std::uintptr_t>(address) & ~std::uintptr_t{7}; }

void stop_watching(Fiber& fiber) {
  for (const std::uintptr_t word : fiber.watched) {
    for (auto [at, end] = sleepers.equal_range(word); at != end;) at = at->second == &fiber ? sleepers.erase(at) : ++at;
  }
  fiber.watched.clear();
}

}  // namespace

void watch(const void* address) {
  Fiber& fiber = scheduler.current();
  if (fiber.is_polling) fiber.watched.push_back(word_of(address));
}

bool sleep_until_notified(const Wait& wait) {
  Fiber& fiber = scheduler.current();
  for (const std::uintptr_t word : fiber.watched) sleepers.emplace(word, &fiber);
  fiber.is_polling = false;
  fiber.is_expired = false;
  scheduler.sleep(wait);
  stop_watching(fiber);  // in case it was woken by something else
  return !fiber.is_expired;
}

void notify(const void* address, std::size_t num_bytes) {
  scheduler.note_progress();
  const auto first = sleepers.lower_bound(word_of(address));
  const auto last = sleepers.lower_bound(reinterpret_cast<std::uintptr_t>(address) + num_bytes);
  for (auto at = first; at != last; ++at) scheduler.wake(*at->second);
}

bool notify_all() {
  for (const auto& [word, fiber] : sleepers) scheduler.wake(*fiber);
  return !sleepers.empty();
}

void expire(Fiber& fiber) {
  fiber.is_expired = true;
  scheduler.wake(fiber);
}

void forget_watches() { sleepers.clear(); }

void begin_poll(const Site& site) {
  Fiber& fiber = scheduler.current();
  fiber.site = site;
  scheduler.preempt();
  fiber.is_polling = true;
  fiber.watched.clear();
}

void end_poll() {
  scheduler.current().is_polling = false;
  scheduler.current().watched.clear();
}

bool park_poll(const Wait& wait) { return sleep_until_notified(wait); }

}  // namespace deep_ep::sim

namespace deep_ep::device {

std::uint64_t clock_ns() {
  sim::scheduler.now_ns += 1;  // so that whoever loops on the clock gets somewhere
  sim::scheduler.preempt();
  return sim::scheduler.now_ns;
}

}  // namespace deep_ep::device
