// Loads, stores and additions whose order and scope stand in their names: C++ atomics of that order, so that the race
// detector knows exactly the edges that the GPU promises. The scopes order alike; a wait for another rank's word that
// either side accesses with gpu scope is reported.
//
//   relaxed   the access is whole (never torn); it orders nothing else.
//   acquire   what the writer did before its release is visible to this thread afterwards.
//   release   what this thread did before (and what it acquired, synchronised with, or waited for as a bulk store) is
//             visible to whoever acquires the value.
#pragma once

#include <deep_ep/device/sim/thread.cuh>

namespace deep_ep::sim {

// What an access may touch: loads and stores any memory, the others only one space (as the GPU's instructions do).
enum class Space { kAny, kGlobal, kShared };

// Among whom an access is ordered: the threads of one rank, or all.
enum class Scope { kGpu, kSys };

// Before an access: other threads may run; the address is checked.
void before_access(const void* address, int num_bytes, Space space, const Site& site);

// After it: the engine wakes those who wait for a word, and follows fences (`order` is an __ATOMIC_ constant).
void after_load(const void* address, int order, Scope scope);
void after_store(void* address, int num_bytes, int order, Scope scope);
void after_update(void* address, int num_bytes, int order, Scope scope);

void fence(const Site& site);

}  // namespace deep_ep::sim

namespace deep_ep::device {

#define EP_DEFINE_LOAD(name, order, scope)                                        \
  template <class T>                                                              \
  EP_DEVICE T name(const T* address, sim::Site site = sim::Site::current()) {     \
    const auto* word = reinterpret_cast<const detail::AccessedWord<T>*>(address); \
    sim::before_access(address, sizeof(T), sim::Space::kAny, site);               \
    const auto value = __atomic_load_n(word, order);                              \
    sim::after_load(address, order, sim::Scope::scope);                           \
    return __builtin_bit_cast(T, value);                                          \
  }

#define EP_DEFINE_STORE(name, order, scope)                                                               \
  template <class T>                                                                                      \
  EP_DEVICE void name(T* address, std::type_identity_t<T> value, sim::Site site = sim::Site::current()) { \
    using Word = detail::AccessedWord<T>;                                                                 \
    sim::before_access(address, sizeof(T), sim::Space::kAny, site);                                       \
    __atomic_store_n(reinterpret_cast<Word*>(address), __builtin_bit_cast(Word, value), order);           \
    sim::after_store(address, sizeof(T), order, sim::Scope::scope);                                       \
  }

#define EP_DEFINE_FETCH_ADD(Result, name, order, scope)                                                     \
  template <class T>                                                                                        \
  EP_DEVICE Result name(T* address, std::type_identity_t<T> value, sim::Site site = sim::Site::current()) { \
    static_assert(std::is_integral_v<T>, "floats are added in a fixed order, never by atomics");            \
    static_assert(sizeof(detail::AccessedWord<T>) == sizeof(T));                                            \
    sim::before_access(address, sizeof(T), sim::Space::kGlobal, site);                                      \
    const T old = __atomic_fetch_add(address, value, order);                                                \
    sim::after_update(address, sizeof(T), order, sim::Scope::scope);                                        \
    return static_cast<Result>(old);                                                                        \
  }

#define EP_DEFINE_COMPARE_EXCHANGE(name, scope)                                                            \
  template <class T>                                                                                       \
  EP_DEVICE T name(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> desired,          \
                   sim::Site site = sim::Site::current()) {                                                \
    using Word = detail::AccessedWord<T>;                                                                  \
    auto old = __builtin_bit_cast(Word, expected);                                                         \
    sim::before_access(address, sizeof(T), sim::Space::kGlobal, site);                                     \
    __atomic_compare_exchange_n(reinterpret_cast<Word*>(address), &old, __builtin_bit_cast(Word, desired), \
                                /*weak=*/false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);                       \
    sim::after_update(address, sizeof(T), __ATOMIC_ACQ_REL, sim::Scope::scope);                            \
    return __builtin_bit_cast(T, old);                                                                     \
  }

EP_DEFINE_LOAD(load_relaxed_gpu, __ATOMIC_RELAXED, kGpu)
EP_DEFINE_LOAD(load_relaxed_sys, __ATOMIC_RELAXED, kSys)
EP_DEFINE_LOAD(load_acquire_gpu, __ATOMIC_ACQUIRE, kGpu)
EP_DEFINE_LOAD(load_acquire_sys, __ATOMIC_ACQUIRE, kSys)

EP_DEFINE_STORE(store_relaxed_gpu, __ATOMIC_RELAXED, kGpu)
EP_DEFINE_STORE(store_relaxed_sys, __ATOMIC_RELAXED, kSys)
EP_DEFINE_STORE(store_release_gpu, __ATOMIC_RELEASE, kGpu)
EP_DEFINE_STORE(store_release_sys, __ATOMIC_RELEASE, kSys)

EP_DEFINE_FETCH_ADD(void, add_relaxed_gpu, __ATOMIC_RELAXED, kGpu)
EP_DEFINE_FETCH_ADD(void, add_relaxed_sys, __ATOMIC_RELAXED, kSys)
EP_DEFINE_FETCH_ADD(void, add_release_gpu, __ATOMIC_RELEASE, kGpu)
EP_DEFINE_FETCH_ADD(void, add_release_sys, __ATOMIC_RELEASE, kSys)

// The old value comes back.
EP_DEFINE_FETCH_ADD(T, fetch_add_relaxed_gpu, __ATOMIC_RELAXED, kGpu)
EP_DEFINE_FETCH_ADD(T, fetch_add_relaxed_sys, __ATOMIC_RELAXED, kSys)
EP_DEFINE_FETCH_ADD(T, fetch_add_acq_rel_gpu, __ATOMIC_ACQ_REL, kGpu)
EP_DEFINE_FETCH_ADD(T, fetch_add_acq_rel_sys, __ATOMIC_ACQ_REL, kSys)

// Acquire and release; the old value comes back, and `desired` was stored if it equals `expected`.
EP_DEFINE_COMPARE_EXCHANGE(compare_exchange_gpu, kGpu)
EP_DEFINE_COMPARE_EXCHANGE(compare_exchange_sys, kSys)

#undef EP_DEFINE_LOAD
#undef EP_DEFINE_STORE
#undef EP_DEFINE_FETCH_ADD
#undef EP_DEFINE_COMPARE_EXCHANGE

// An addition to shared memory that returns the old value; it orders nothing else.
EP_DEVICE int fetch_add_shared(int* address, int value, sim::Site site = sim::Site::current()) {
  sim::before_access(address, sizeof(int), sim::Space::kShared, site);
  const int old = __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
  sim::after_update(address, sizeof(int), __ATOMIC_RELAXED, sim::Scope::kGpu);
  return old;
}

// Relaxed stores after the fence publish what came before it; relaxed loads before it acquire for what comes after.
EP_DEVICE void fence_gpu(sim::Site site = sim::Site::current()) { sim::fence(site); }
EP_DEVICE void fence_sys(sim::Site site = sim::Site::current()) { sim::fence(site); }

// Sixteen bytes: what one thread moves in one instruction.
struct alignas(16) Vector16 {
  std::uint32_t word[4];
};

// Plain accesses, ordered by fences and synchronisation like a dereference. T of 4, 8 or 16 bytes, aligned to its size.
template <class T>
EP_DEVICE T load_streaming(const T* address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  static_assert(alignof(T) == sizeof(T), "it is accessed at once: declare the type alignas its size");
  return *address;
}

template <class T>
EP_DEVICE void store_streaming(T* address, std::type_identity_t<T> value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  static_assert(alignof(T) == sizeof(T), "it is accessed at once: declare the type alignas its size");
  *address = value;
}

}  // namespace deep_ep::device
