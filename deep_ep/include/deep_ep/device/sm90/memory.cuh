// Loads, stores and additions whose order and scope stand in their names. Global memory is this GPU's, a peer's
// window, or pinned host memory. Loads and stores take shared memory too; the others take global memory
// (fetch_add_shared: only shared memory).
//
//   relaxed   the access is whole (never torn) and goes past L1; it orders nothing else.
//   acquire   what the writer did before its release is visible to this thread afterwards.
//   release   what this thread did before (and what it acquired, synchronised with, or waited for as a bulk store) is
//             visible to whoever acquires the value.
//   gpu, sys  among the threads of this GPU; among all GPUs and the host.
#pragma once

#include <deep_ep/device/sm90/language.cuh>

namespace deep_ep::device {

// One definition a line below: the primitive's name and the instruction that it is, for 4 bytes and for 8. Every one
// tells the compiler that memory changes, so that no plain access moves across it.
#define EP_DEFINE_LOAD(name, instruction)                                                \
  template <class T>                                                                     \
  EP_DEVICE T name(const T* address) {                                                   \
    detail::AccessedWord<T> word;                                                        \
    if constexpr (sizeof(T) == 4) {                                                      \
      asm volatile(instruction ".b32 %0, [%1];" : "=r"(word) : "l"(address) : "memory"); \
    } else {                                                                             \
      asm volatile(instruction ".b64 %0, [%1];" : "=l"(word) : "l"(address) : "memory"); \
    }                                                                                    \
    return __builtin_bit_cast(T, word);                                                  \
  }

#define EP_DEFINE_STORE(name, instruction)                                             \
  template <class T>                                                                   \
  EP_DEVICE void name(T* address, std::type_identity_t<T> value) {                     \
    const auto word = __builtin_bit_cast(detail::AccessedWord<T>, value);              \
    if constexpr (sizeof(T) == 4) {                                                    \
      asm volatile(instruction ".b32 [%0], %1;" ::"l"(address), "r"(word) : "memory"); \
    } else {                                                                           \
      asm volatile(instruction ".b64 [%0], %1;" ::"l"(address), "l"(word) : "memory"); \
    }                                                                                  \
  }

#define EP_DEFINE_ADD(name, instruction)                                                                       \
  template <class T>                                                                                           \
  EP_DEVICE void name(T* address, std::type_identity_t<T> value) {                                             \
    static_assert(std::is_integral_v<T>, "floats are added in a fixed order, never by atomics");               \
    const auto word = __builtin_bit_cast(detail::AccessedWord<T>, value);                                      \
    if constexpr (sizeof(T) == 4) {                                                                            \
      asm volatile(instruction ".u32 [%0], %1;" ::"l"(detail::global_address(address)), "r"(word) : "memory"); \
    } else {                                                                                                   \
      asm volatile(instruction ".u64 [%0], %1;" ::"l"(detail::global_address(address)), "l"(word) : "memory"); \
    }                                                                                                          \
  }

#define EP_DEFINE_FETCH_ADD(name, instruction)                                                   \
  template <class T>                                                                             \
  EP_DEVICE T name(T* address, std::type_identity_t<T> value) {                                  \
    static_assert(std::is_integral_v<T>, "floats are added in a fixed order, never by atomics"); \
    const auto word = __builtin_bit_cast(detail::AccessedWord<T>, value);                        \
    detail::AccessedWord<T> old;                                                                 \
    if constexpr (sizeof(T) == 4) {                                                              \
      asm volatile(instruction ".u32 %0, [%1], %2;"                                              \
                   : "=r"(old)                                                                   \
                   : "l"(detail::global_address(address)), "r"(word)                             \
                   : "memory");                                                                  \
    } else {                                                                                     \
      asm volatile(instruction ".u64 %0, [%1], %2;"                                              \
                   : "=l"(old)                                                                   \
                   : "l"(detail::global_address(address)), "l"(word)                             \
                   : "memory");                                                                  \
    }                                                                                            \
    return __builtin_bit_cast(T, old);                                                           \
  }

#define EP_DEFINE_COMPARE_EXCHANGE(name, instruction)                                               \
  template <class T>                                                                                \
  EP_DEVICE T name(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> desired) { \
    const auto old_word = __builtin_bit_cast(detail::AccessedWord<T>, expected);                    \
    const auto new_word = __builtin_bit_cast(detail::AccessedWord<T>, desired);                     \
    detail::AccessedWord<T> seen;                                                                   \
    if constexpr (sizeof(T) == 4) {                                                                 \
      asm volatile(instruction ".b32 %0, [%1], %2, %3;"                                             \
                   : "=r"(seen)                                                                     \
                   : "l"(detail::global_address(address)), "r"(old_word), "r"(new_word)             \
                   : "memory");                                                                     \
    } else {                                                                                        \
      asm volatile(instruction ".b64 %0, [%1], %2, %3;"                                             \
                   : "=l"(seen)                                                                     \
                   : "l"(detail::global_address(address)), "l"(old_word), "l"(new_word)             \
                   : "memory");                                                                     \
    }                                                                                               \
    return __builtin_bit_cast(T, seen);                                                             \
  }

EP_DEFINE_LOAD(load_relaxed_gpu, "ld.relaxed.gpu")
EP_DEFINE_LOAD(load_relaxed_sys, "ld.relaxed.sys")
EP_DEFINE_LOAD(load_acquire_gpu, "ld.acquire.gpu")
EP_DEFINE_LOAD(load_acquire_sys, "ld.acquire.sys")

EP_DEFINE_STORE(store_relaxed_gpu, "st.relaxed.gpu")
EP_DEFINE_STORE(store_relaxed_sys, "st.relaxed.sys")
EP_DEFINE_STORE(store_release_gpu, "st.release.gpu")
EP_DEFINE_STORE(store_release_sys, "st.release.sys")

// Integers only; nothing comes back, so nobody waits for the round trip.
EP_DEFINE_ADD(add_relaxed_gpu, "red.relaxed.gpu.global.add")
EP_DEFINE_ADD(add_relaxed_sys, "red.relaxed.sys.global.add")
EP_DEFINE_ADD(add_release_gpu, "red.release.gpu.global.add")
EP_DEFINE_ADD(add_release_sys, "red.release.sys.global.add")

// The old value comes back.
EP_DEFINE_FETCH_ADD(fetch_add_relaxed_gpu, "atom.relaxed.gpu.global.add")
EP_DEFINE_FETCH_ADD(fetch_add_relaxed_sys, "atom.relaxed.sys.global.add")
EP_DEFINE_FETCH_ADD(fetch_add_acq_rel_gpu, "atom.acq_rel.gpu.global.add")
EP_DEFINE_FETCH_ADD(fetch_add_acq_rel_sys, "atom.acq_rel.sys.global.add")

// Acquire and release; the old value comes back, and `desired` was stored if it equals `expected`.
EP_DEFINE_COMPARE_EXCHANGE(compare_exchange_gpu, "atom.acq_rel.gpu.global.cas")
EP_DEFINE_COMPARE_EXCHANGE(compare_exchange_sys, "atom.acq_rel.sys.global.cas")

#undef EP_DEFINE_LOAD
#undef EP_DEFINE_STORE
#undef EP_DEFINE_ADD
#undef EP_DEFINE_FETCH_ADD
#undef EP_DEFINE_COMPARE_EXCHANGE

// An addition to shared memory that returns the old value; it orders nothing else.
EP_DEVICE int fetch_add_shared(int* address, int value) {
  int old;
  asm volatile("atom.relaxed.cta.shared.add.s32 %0, [%1], %2;"
               : "=r"(old)
               : "r"(detail::shared_address(address)), "r"(value)
               : "memory");
  return old;
}

// Relaxed stores after the fence publish what came before it; relaxed loads before it acquire for what comes after.
EP_DEVICE void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
EP_DEVICE void fence_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// Sixteen bytes: what one thread moves in one instruction.
struct alignas(16) Vector16 {
  std::uint32_t word[4];
};

// Plain accesses, ordered by fences and synchronisation like a dereference, for data that is touched once: they leave
// L1 to others. T of 4, 8 or 16 bytes, aligned to its size.
template <class T>
EP_DEVICE T load_streaming(const T* address) {
  if constexpr (sizeof(T) == 16) {
    static_assert(alignof(T) == 16, "16 bytes are accessed at once: declare the type alignas(16)");
    Vector16 vector;
    asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(vector.word[0]), "=r"(vector.word[1]), "=r"(vector.word[2]), "=r"(vector.word[3])
                 : "l"(detail::global_address(address))
                 : "memory");
    return __builtin_bit_cast(T, vector);
  } else {
    detail::AccessedWord<T> word;
    if constexpr (sizeof(T) == 4) {
      asm volatile("ld.global.L1::no_allocate.b32 %0, [%1];"
                   : "=r"(word)
                   : "l"(detail::global_address(address))
                   : "memory");
    } else {
      asm volatile("ld.global.L1::no_allocate.b64 %0, [%1];"
                   : "=l"(word)
                   : "l"(detail::global_address(address))
                   : "memory");
    }
    return __builtin_bit_cast(T, word);
  }
}

template <class T>
EP_DEVICE void store_streaming(T* address, std::type_identity_t<T> value) {
  if constexpr (sizeof(T) == 16) {
    static_assert(alignof(T) == 16, "16 bytes are accessed at once: declare the type alignas(16)");
    const auto vector = __builtin_bit_cast(Vector16, value);
    asm volatile("st.global.L1::no_allocate.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(detail::global_address(address)),
                 "r"(vector.word[0]), "r"(vector.word[1]), "r"(vector.word[2]), "r"(vector.word[3])
                 : "memory");
  } else {
    const auto word = __builtin_bit_cast(detail::AccessedWord<T>, value);
    if constexpr (sizeof(T) == 4) {
      asm volatile("st.global.L1::no_allocate.b32 [%0], %1;" ::"l"(detail::global_address(address)), "r"(word)
                   : "memory");
    } else {
      asm volatile("st.global.L1::no_allocate.b64 [%0], %1;" ::"l"(detail::global_address(address)), "l"(word)
                   : "memory");
    }
  }
}

}  // namespace deep_ep::device
