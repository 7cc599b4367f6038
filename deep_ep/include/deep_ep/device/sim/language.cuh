// How device code is spelled for g++: the macros that kernels use, and two helpers of this folder.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <type_traits>

// Qualifies every function that runs on the device. Hidden, so that no other shared object (an engine or a kernel that
// was compiled without the race detector) can lend its copy of an inline function.
#define EP_DEVICE __attribute__((visibility("hidden"))) inline

// Before a loop that is not worth unrolling on a GPU.
#define EP_NO_UNROLL

// Defines the entry `name`, launched with exactly `threads` threads a block. The body follows and sees `const Args&
// args`. The two constants let the world check a launch before it runs.
#define EP_ENTRY(name, threads, Args)                                                                              \
  static_assert((threads) >= 32 && (threads) <= 1024 && (threads) % 32 == 0, "blocks of whole warps, up to 1024"); \
  extern "C" {                                                                                                     \
  extern const int name##_num_threads, name##_args_bytes;                                                          \
  const int name##_num_threads = (threads), name##_args_bytes = sizeof(Args);                                      \
  }                                                                                                                \
  extern "C" void name(const Args& args)

// The byte offset of a field, as a constant expression.
#define EP_OFFSET(Type, field) offsetof(Type, field)

namespace deep_ep::sim {

// The place in the kernel's source that calls a primitive; reports name it. Callers never pass it.
using Site = std::source_location;

}  // namespace deep_ep::sim

namespace deep_ep::device::detail {

// The unsigned integer as wide as T, for primitives that move bits and do not ask what they mean.
template <class T>
struct WordOf {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "this primitive takes values of 4 or 8 bytes");
  static_assert(std::is_trivially_copyable_v<T>, "this primitive moves the bits of a value");
  using type = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
};
template <class T>
using Word = typename WordOf<T>::type;

// The same for a value in memory, which one instruction must be able to access whole.
template <class T>
struct AccessedWordOf : WordOf<T> {
  static_assert(alignof(T) == sizeof(T), "this primitive accesses a value at once: declare its type alignas its size");
};
template <class T>
using AccessedWord = typename AccessedWordOf<T>::type;

}  // namespace deep_ep::device::detail
