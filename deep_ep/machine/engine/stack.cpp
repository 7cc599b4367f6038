#include "stack.hpp"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <new>

#include "tsan.hpp"

#if defined(__x86_64__)
// Callee-saved: rbp, rbx, r12 to r15; the return address lies above them.
asm(R"(
.text
.globl deep_ep_switch_stack
.type deep_ep_switch_stack, @function
deep_ep_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size deep_ep_switch_stack, . - deep_ep_switch_stack
)");
#elif defined(__aarch64__)
// Callee-saved: x19 to x28, the frame pointer x29, the return address x30, and the low halves of v8 to v15.
asm(R"(
.text
.globl deep_ep_switch_stack
.type deep_ep_switch_stack, %function
deep_ep_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size deep_ep_switch_stack, . - deep_ep_switch_stack
)");
#else
#error "the simulator's stack switch is written for x86-64 and aarch64"
#endif

namespace deep_ep::sim {
namespace {

// Only pages that are touched take memory, usually two. The race detector prints its reports on the guilty stack.
constexpr std::size_t kStackBytes = 256 * 1024;
constexpr std::size_t kGuardBytes = 4096;

}  // namespace

Stack::Stack() {
  void* mapping =
      mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<std::byte*>(mapping);
  // A process may have 65,530 mappings and the race detector takes seven a fiber: there, neighbouring stacks must be
  // one mapping. Stacks that are too small show in a plain world.
  if (!tsan::is_on()) mprotect(mapping_, kGuardBytes, PROT_NONE);
}

Stack::~Stack() { munmap(mapping_, kStackBytes); }

void* Stack::prepare(void (*entry)()) {
  std::byte* top = mapping_ + kStackBytes;
#if defined(__x86_64__)
  // From the top: a zero where the caller of `entry` would be, so that debuggers stop there; `entry`; six registers.
  constexpr std::size_t kFrame = 8 * 8, kEntry = 6 * 8;
#else
  constexpr std::size_t kFrame = 160, kEntry = 88;
#endif
  std::byte* frame = top - kFrame;
  std::memset(frame, 0, kFrame);
  std::memcpy(frame + kEntry, &entry, sizeof entry);
  return frame;
}

}  // namespace deep_ep::sim
