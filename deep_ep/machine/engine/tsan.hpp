// What the engine tells the race detector (ThreadSanitizer), and when. The engine itself is compiled without it; in a
// plain world the functions are absent and everything here does nothing.
//
// Every simulated thread and every lane of a copy engine is a fiber of the detector. Switching between fibers says
// nothing about order (no-sync switches): order comes only from the kernels' own atomics, which the detector sees, and
// from Tokens, which the engine releases and acquires exactly where the GPU promises order.
#pragma once

#include <cstddef>

extern "C" {
[[gnu::weak]] void* __tsan_get_current_fiber();
[[gnu::weak]] void* __tsan_create_fiber(unsigned flags);
[[gnu::weak]] void __tsan_destroy_fiber(void* fiber);
[[gnu::weak]] void __tsan_switch_to_fiber(void* fiber, unsigned flags);
[[gnu::weak]] void __tsan_set_fiber_name(void* fiber, const char* name);
[[gnu::weak]] void __tsan_acquire(void* address);
[[gnu::weak]] void __tsan_release(void* address);
[[gnu::weak]] void __tsan_read_range_pc(void* address, unsigned long num_bytes, void* pc);
[[gnu::weak]] void __tsan_write_range_pc(void* address, unsigned long num_bytes, void* pc);
}

namespace deep_ep::sim::tsan {

inline bool is_on() { return __tsan_create_fiber != nullptr; }

// The detector's view of one line of execution.
class Line {
 public:
  Line() = default;
  Line(const Line&) = delete;
  Line& operator=(const Line&) = delete;
  ~Line() { forget(); }

  // Creating one costs 0.4 ms, so lines live on and are renamed.
  void name(const char* name) {
    if (!is_on()) return;
    if (fiber_ == nullptr) fiber_ = __tsan_create_fiber(0);
    __tsan_set_fiber_name(fiber_, name);
  }
  void forget() {
    if (fiber_ != nullptr) __tsan_destroy_fiber(fiber_);
    fiber_ = nullptr;
  }
  bool exists() const { return fiber_ != nullptr; }

  // The line in which the world was started; it must not be destroyed.
  static void* current() { return is_on() ? __tsan_get_current_fiber() : nullptr; }
  static void enter(void* fiber) {
    if (fiber != nullptr) __tsan_switch_to_fiber(fiber, /*no sync*/ 1);
  }
  void enter() const { enter(fiber_); }

 private:
  void* fiber_ = nullptr;
};

// Something that is released by those who come before and acquired by those who come after. Its address matters.
class Token {
 public:
  Token() = default;
  Token(const Token&) = delete;
  Token& operator=(const Token&) = delete;
  void release() {
    if (is_on()) __tsan_release(&byte_);
  }
  void acquire() {
    if (is_on()) __tsan_acquire(&byte_);
  }

 private:
  char byte_ = 0;
};

// Orders by the address of a word, together with the kernels' own atomics on it.
inline void acquire(const void* address) {
  if (is_on()) __tsan_acquire(const_cast<void*>(address));
}

// An access by the current line; `pc` is the place in the kernel that it is to be blamed on.
inline void note_read(const void* address, std::size_t num_bytes, void* pc) {
  if (is_on()) __tsan_read_range_pc(const_cast<void*>(address), num_bytes, pc);
}
inline void note_write(void* address, std::size_t num_bytes, void* pc) {
  if (is_on()) __tsan_write_range_pc(address, num_bytes, pc);
}

}  // namespace deep_ep::sim::tsan
