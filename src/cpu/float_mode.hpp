// The floating-point mode of a thread: how it rounds, and whether it flushes subnormal numbers to zero.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#elif !defined(__aarch64__)
#include <fenv.h>
#endif

namespace flashcute::cpu {

/// While an object lives, its thread rounds to nearest, keeps subnormal numbers and raises no trap, as a new process
/// does. The mode belongs to the thread, and other libraries change it: torch.set_flush_denormal, or a library linked
/// with -ffast-math in the thread that loads it. Otherwise the same inputs could give other bits on other threads.
class DefaultFloatMode {
 public:
#if defined(__x86_64__)
  DefaultFloatMode() : old_{_mm_getcsr()} { _mm_setcsr(0x1f80); }
  ~DefaultFloatMode() { _mm_setcsr(old_); }

 private:
  unsigned const old_;
#elif defined(__aarch64__)
  DefaultFloatMode() {
    asm volatile("mrs %0, fpcr" : "=r"(old_));
    set(0);
  }
  ~DefaultFloatMode() { set(old_); }

 private:
  static void set(std::uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
  std::uint64_t old_;
#else
  DefaultFloatMode() {
    fegetenv(&old_);
    fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatMode() { fesetenv(&old_); }

 private:
  fenv_t old_;
#endif

 public:
  DefaultFloatMode(DefaultFloatMode const&) = delete;
  DefaultFloatMode& operator=(DefaultFloatMode const&) = delete;
};

}  // namespace flashcute::cpu
