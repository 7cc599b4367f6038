// The copy engine (async proxy): copies between shared and global memory that run beside the threads.
//
// Shared addresses, global addresses and sizes are multiples of 16 bytes. One elected thread issues a copy. A load
// ends on an Mbarrier; stores end in groups that belong to the thread that issued them.
//
// The engine does not see memory through the threads' eyes. Before a copy touches bytes that threads wrote OR read by
// ordinary accesses (or whose arrival they acquired from a peer), those threads run fence_async_proxy, and only then
// synchronise with the thread that issues the copy. The other way needs no fence: who has waited for a copy sees it.
#pragma once

#include <deep_ep/device/sm90/language.cuh>

namespace deep_ep::device {

// In shared memory. It counts arrivals and outstanding bytes; when both are complete, its phase ends and the next
// begins. Phases alternate in parity: the first has parity 0.
struct alignas(8) Mbarrier {
  std::uint64_t state;
};

// A phase takes `arrivals` arrivals. One thread does this once; then it runs fence_mbarrier_init and synchronises.
EP_DEVICE void mbarrier_init(Mbarrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(detail::shared_address(&barrier)), "r"(arrivals)
               : "memory");
}

// Initialised barriers become visible to the copy engine and to the cluster.
EP_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// What this thread did before is visible (in this block) to whoever waits for the phase that this arrival helps end.
EP_DEVICE void mbarrier_arrive(Mbarrier& barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(detail::shared_address(&barrier))
               : "memory");
}

// The same, and the phase also lasts until bulk loads have brought `bytes` more.
EP_DEVICE void mbarrier_arrive_expect(Mbarrier& barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(detail::shared_address(&barrier)),
      "r"(bytes)
      : "memory");
}

// Whether the phase of this parity has ended. If so: what was done before its arrivals, and the bytes that bulk loads
// brought, are visible to this thread.
EP_DEVICE bool mbarrier_test(Mbarrier& barrier, std::uint32_t parity) {
  std::uint32_t has_ended;
  asm volatile(
      "{\n"
      "  .reg .pred has_ended;\n"
      "  mbarrier.test_wait.parity.acquire.cta.shared::cta.b64 has_ended, [%1], %2;\n"
      "  selp.u32 %0, 1, 0, has_ended;\n"
      "}"
      : "=r"(has_ended)
      : "r"(detail::shared_address(&barrier)), "r"(parity)
      : "memory");
  return has_ended != 0;
}

// Waits until the phase of this parity has ended; then as mbarrier_test. The hardware suspends the thread for a while.
EP_DEVICE void mbarrier_wait(Mbarrier& barrier, std::uint32_t parity) {
  std::uint32_t has_ended;
  do {
    asm volatile(
        "{\n"
        "  .reg .pred has_ended;\n"
        "  mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 has_ended, [%1], %2;\n"
        "  selp.u32 %0, 1, 0, has_ended;\n"
        "}"
        : "=r"(has_ended)
        : "r"(detail::shared_address(&barrier)), "r"(parity)
        : "memory");
  } while (has_ended == 0);
}

// Global (own or a peer's) to shared memory; its completion counts on the barrier, whose waiters see the bytes.
EP_DEVICE void bulk_load(void* shared, const void* global, int bytes, Mbarrier& barrier) {
  asm volatile("cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   detail::shared_address(shared)),
               "l"(detail::global_address(global)), "r"(bytes), "r"(detail::shared_address(&barrier))
               : "memory");
}

// Own global memory, which will be read soon, into the GPU's L2 cache. A hint: it is not waited for, and orders
// nothing.
EP_DEVICE void bulk_prefetch(const void* global, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(detail::global_address(global)), "r"(bytes)
               : "memory");
}

// Shared to global memory (own or a peer's). Part of the thread's next group.
EP_DEVICE void bulk_store(void* global, const void* shared, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(detail::global_address(global)),
               "r"(detail::shared_address(shared)), "r"(bytes)
               : "memory");
}

// The stores that this thread issued since its last commit form a group.
EP_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// All but the N latest groups of this thread have read their source: it may be overwritten.
template <int N>
EP_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// All but the N latest groups of this thread are complete and visible to this thread: a release of its own announces
// them to others.
template <int N>
EP_DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

// This thread's ordinary accesses before (and those it has synchronised with), to shared and global memory, come before
// the copies issued after, by this thread or by one that synchronises with it. It waits for the thread's stores to
// reach the whole GPU, so inside a loop take one of the next two.
EP_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async;" ::: "memory"); }

// The same for this block's shared memory only, and for global memory only; they do not wait for that.
EP_DEVICE void fence_async_proxy_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
EP_DEVICE void fence_async_proxy_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

}  // namespace deep_ep::device
