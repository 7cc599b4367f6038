// Signals that a kernel raises: the report, then the end of the process (its memory is not to be trusted any more).
#include <dlfcn.h>
#include <signal.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <sstream>

#include "memory.hpp"
#include "report.hpp"
#include "scheduler.hpp"

namespace deep_ep::sim {
namespace {

constexpr int kExitStatus = 67;

std::uintptr_t program_counter(const void* context) {
  const auto& machine = static_cast<const ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
  return static_cast<std::uintptr_t>(machine.gregs[REG_RIP]);
#else
  return machine.pc;
#endif
}

// The fault is in a kernel's code, not in the midst of an allocation, so that ordinary strings can be used.
void report(int signal, siginfo_t* info, void* context) {
  std::ostringstream text;
  text << "crash: " << strsignal(signal);
  if (signal == SIGSEGV || signal == SIGBUS) text << ", touching " << describe(info->si_addr, 1);
  if (scheduler.in_fiber()) {
    text << "\n  " << name_of(scheduler.current());
    if (scheduler.current().site.line() != 0) text << ", after " << name_of(scheduler.current().site);
  }
  const std::uintptr_t pc = program_counter(context);
  Dl_info object;
  if (dladdr(reinterpret_cast<void*>(pc), &object) != 0) {
    text << "\n  pc " << object.dli_fname << "+0x" << std::hex
         << pc - reinterpret_cast<std::uintptr_t>(object.dli_fbase);
  }
  text << "\n";
  const std::string report = text.str();
  if (write(STDERR_FILENO, report.data(), report.size()) < 0) _exit(kExitStatus);
  _exit(kExitStatus);
}

}  // namespace

void install_crash_reports() {
  constexpr std::size_t kBytes = 256 * 1024;
  stack_t stack = {};
  stack.ss_sp = std::malloc(kBytes);  // for a fiber that has used up its own
  stack.ss_size = kBytes;
  sigaltstack(&stack, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = report;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT}) sigaction(signal, &action, nullptr);
}

}  // namespace deep_ep::sim
