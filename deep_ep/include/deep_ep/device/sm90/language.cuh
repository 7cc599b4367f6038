// How device code is spelled for nvcc and NVRTC: the macros that kernels use, and two helpers of this folder.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

// Qualifies every function that runs on the device.
#define EP_DEVICE __device__ __forceinline__

// Before a loop that is not worth unrolling: less code, compiled sooner.
#define EP_NO_UNROLL _Pragma("unroll 1")

// Defines the entry `name`, launched with exactly `threads` threads a block. The body follows and sees the arguments,
// `const Args& args`, which stay in constant memory. One block per SM is all we ask for, so a thread may use as many
// registers as there are.
#define EP_ENTRY(name, threads, Args) \
  extern "C" __global__ void __launch_bounds__(threads, 1) name(const __grid_constant__ Args args)

// The byte offset of a field, as a constant expression. NVRTC has no __builtin_offsetof.
#ifdef __CUDACC_RTC__
#define EP_OFFSET(Type, field) (static_cast<std::size_t>(__INTADDR__(&(static_cast<Type*>(nullptr)->field))))
#else
#define EP_OFFSET(Type, field) offsetof(Type, field)
#endif

namespace deep_ep::device::detail {

// The unsigned integer as wide as T, for instructions that move bits and do not ask what they mean.
template <class T>
struct WordOf {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "this primitive takes values of 4 or 8 bytes");
  static_assert(std::is_trivially_copyable_v<T>, "this primitive moves the bits of a value");
  using type = std::conditional_t<sizeof(T) == 4, std::uint32_t, unsigned long long>;
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

// PTX wants an address in the window of its space. For global memory this costs nothing.
EP_DEVICE std::uint64_t global_address(const void* pointer) { return __cvta_generic_to_global(pointer); }
EP_DEVICE std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace deep_ep::device::detail
