// Loads, stores and updates of words, and fences. The kernels do them themselves, as C++ atomics; here are the checks,
// the wake-ups, and what ThreadSanitizer does not know: fences.
//
// A fence releases what its thread did to everyone who then reads, from a relaxed store that follows the fence, either
// by an acquire load, or by a relaxed load that a fence of the reader follows. So every fence gets a token, a relaxed
// store leaves its thread's latest fence at the word, and readers acquire it, at once or at their next fence.
#include <deep_ep/device/sim/memory.cuh>

#include <memory>
#include <unordered_map>
#include <vector>

#include "memory.hpp"
#include "scheduler.hpp"
#include "watch.hpp"
#include "words.hpp"

namespace deep_ep::sim {
namespace {

struct Fence {
  tsan::Token token;
};

// Who stored or updated a word last.
struct Writer {
  int rank;
  Scope scope;
  Site site;
};

std::unordered_map<const void*, Writer> writers;  // by word

std::vector<std::unique_ptr<Fence>> fences;                      // of this launch
std::unordered_map<const Fiber*, Fence*> latest_fences;          // by thread
std::unordered_map<const void*, std::vector<Fence*>> published;  // by word: the fences that its value comes after

void note_writer(const void* address, Scope scope) {
  const Fiber& fiber = scheduler.current();
  writers.insert_or_assign(address, Writer{fiber.rank(), scope, fiber.site});
}

// A value that a poll reads may come from a store that nothing else orders, so both need the scope that reaches. (Other
// loads may well come after the store in some other way.)
void check_scope(const void* address, Scope scope) {
  const Fiber& fiber = scheduler.current();
  if (!fiber.is_polling) return;
  const auto found = writers.find(address);
  if (found == writers.end() || found->second.rank == fiber.rank()) return;
  if (scope == Scope::kSys && found->second.scope == Scope::kSys) return;
  scheduler.fail(fiber.site, "gpu scope does not reach another rank: this waits for " + describe(address, 4) +
                                 ", which rank " + std::to_string(found->second.rank) + " wrote at " +
                                 name_of(found->second.site) + "; both need the sys scope");
}

bool is_release(int order) { return order == __ATOMIC_RELEASE || order == __ATOMIC_ACQ_REL; }
bool is_acquire(int order) { return order == __ATOMIC_ACQUIRE || order == __ATOMIC_ACQ_REL; }

void acquire_fences_at(const void* address) {
  const auto found = published.find(address);
  if (found == published.end()) return;
  for (Fence* fence : found->second) fence->token.acquire();
}

// A store begins a new list; an update goes on with the one that it read (C++ calls it a release sequence).
void publish_fence(const void* address, int order, bool goes_on) {
  if (fences.empty()) return;
  if (!goes_on) published.erase(address);
  const auto latest = latest_fences.find(&scheduler.current());
  if (latest != latest_fences.end() && !is_release(order)) published[address].push_back(latest->second);
}

}  // namespace

void forget_words() {
  writers.clear();
  fences.clear();
  latest_fences.clear();
  published.clear();
}

void forget_fences(const Fiber& fiber) { latest_fences.erase(&fiber); }

void before_access(const void* address, int num_bytes, Space space, const Site& site) {
  Fiber& fiber = scheduler.current();
  fiber.site = site;
  scheduler.preempt();
  if (reinterpret_cast<std::uintptr_t>(address) % num_bytes != 0) {
    scheduler.fail(site, "an access to " + describe(address, num_bytes) + " is not aligned to its " +
                             std::to_string(num_bytes) + " bytes");
  }
  const Region* region = find_region(address, num_bytes);
  if (region == nullptr) {
    scheduler.fail(site, "an access to " + describe(address, num_bytes) + ", which is no memory of this world");
  }
  const bool is_shared = region->owner != nullptr;
  if (is_shared && region->owner != fiber.block) {
    scheduler.fail(site, "an access to " + describe(address, num_bytes) + ", the shared memory of another block");
  }
  if ((space == Space::kShared && !is_shared) || (space == Space::kGlobal && is_shared)) {
    scheduler.fail(site, std::string("this primitive takes ") + (is_shared ? "global" : "shared") +
                             " memory only, and came to " + describe(address, num_bytes));
  }
}

void after_load(const void* address, int order, Scope scope) {
  watch(address);
  check_scope(address, scope);
  if (!tsan::is_on()) return;
  if (is_acquire(order)) return acquire_fences_at(address);
  std::vector<const void*>& loaded = scheduler.current().loaded;
  if (loaded.empty() || loaded.back() != address) loaded.push_back(address);
}

void after_store(void* address, int num_bytes, int order, Scope scope) {
  note_writer(address, scope);
  publish_fence(address, order, /*goes_on=*/false);
  notify(address, num_bytes);
}

void after_update(void* address, int num_bytes, int order, Scope scope) {
  after_load(address, order, scope);
  note_writer(address, scope);
  publish_fence(address, order, /*goes_on=*/true);
  notify(address, num_bytes);
}

void fence(const Site& site) {
  Fiber& fiber = scheduler.current();
  fiber.site = site;
  scheduler.preempt();
  if (!tsan::is_on()) return;
  for (const void* address : fiber.loaded) {
    tsan::acquire(address);  // what release stores left there
    acquire_fences_at(address);
  }
  fiber.loaded.clear();
  fences.push_back(std::make_unique<Fence>());
  fences.back()->token.release();
  latest_fences[&fiber] = fences.back().get();
}

}  // namespace deep_ep::sim
