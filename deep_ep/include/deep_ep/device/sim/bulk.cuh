// The copy engine (async proxy): every copy is an agent of the engine that runs later, at a seeded moment.
//
// Shared addresses, global addresses and sizes are multiples of 16 bytes. One elected thread issues a copy. A load
// ends on an Mbarrier; stores end in groups that belong to the thread that issued them. A store has two moments: it
// reads its source, and later it writes its destination.
//
// An agent knows of earlier accesses only what a fence_async_proxy of its block, or the launch, told it. So before a
// copy touches bytes that threads wrote OR read by ordinary accesses (or whose arrival they acquired from a peer),
// those threads run the fence and only then synchronise with the thread that issues the copy. The other way needs no
// fence: who has waited for a copy sees it.
#pragma once

#include <deep_ep/device/sim/thread.cuh>

namespace deep_ep::device {

// In shared memory. It counts arrivals and outstanding bytes; when both are complete, its phase ends and the next
// begins. Phases alternate in parity: the first has parity 0. The engine keeps the counts beside it.
struct alignas(8) Mbarrier {
  std::uint64_t state;
};

// A phase takes `arrivals` arrivals. One thread does this once; then it runs fence_mbarrier_init and synchronises.
void mbarrier_init(Mbarrier& barrier, int arrivals, sim::Site site = sim::Site::current());

// Barriers that this thread initialised become visible to the copy engine: a bulk load on any other is reported.
void fence_mbarrier_init(sim::Site site = sim::Site::current());

// What this thread did before is visible (in this block) to whoever waits for the phase that this arrival helps end.
void mbarrier_arrive(Mbarrier& barrier, sim::Site site = sim::Site::current());

// The same, and the phase also lasts until bulk loads have brought `bytes` more.
void mbarrier_arrive_expect(Mbarrier& barrier, int bytes, sim::Site site = sim::Site::current());

// Whether the phase of this parity has ended. If so: what was done before its arrivals, and the bytes that bulk loads
// brought, are visible to this thread.
bool mbarrier_test(Mbarrier& barrier, std::uint32_t parity, sim::Site site = sim::Site::current());

// Waits until the phase of this parity has ended; then as mbarrier_test.
void mbarrier_wait(Mbarrier& barrier, std::uint32_t parity, sim::Site site = sim::Site::current());

// Global (own or a peer's) to shared memory; its completion counts on the barrier, whose waiters see the bytes.
void bulk_load(void* shared, const void* global, int bytes, Mbarrier& barrier, sim::Site site = sim::Site::current());

// Own global memory, which will be read soon, into the GPU's L2 cache. A hint: it is not waited for, and orders
// nothing. Here there is no cache; only what the engine would refuse is looked at.
void bulk_prefetch(const void* global, int bytes, sim::Site site = sim::Site::current());

// Shared to global memory (own or a peer's). Part of the thread's next group.
void bulk_store(void* global, const void* shared, int bytes, sim::Site site = sim::Site::current());

// The stores that this thread issued since its last commit form a group.
void bulk_commit(sim::Site site = sim::Site::current());

namespace detail {
void wait_for_reads(int num_latest, const sim::Site& site);
void wait_for_writes(int num_latest, const sim::Site& site);
}  // namespace detail

// All but the N latest groups of this thread have read their source: it may be overwritten.
template <int N>
EP_DEVICE void bulk_wait_read(sim::Site site = sim::Site::current()) {
  detail::wait_for_reads(N, site);
}

// All but the N latest groups of this thread are complete and visible to this thread: a release of its own announces
// them to others.
template <int N>
EP_DEVICE void bulk_wait(sim::Site site = sim::Site::current()) {
  detail::wait_for_writes(N, site);
}

// This thread's ordinary accesses before (and those it has synchronised with), to shared and global memory, come before
// the copies issued after, by this thread or by one of its block that synchronises with it.
void fence_async_proxy(sim::Site site = sim::Site::current());

// The same for this block's shared memory only, and for global memory only.
void fence_async_proxy_shared(sim::Site site = sim::Site::current());
void fence_async_proxy_global(sim::Site site = sim::Site::current());

}  // namespace deep_ep::device
