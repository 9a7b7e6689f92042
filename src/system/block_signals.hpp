// Blocks signals while threads start that must never run a signal handler.
#pragma once

#include <signal.h>

namespace flashcute {

/// While an object lives, all signals are blocked in its thread, except faults of the thread itself. Threads that are
/// started meanwhile inherit the mask and never run handlers meant for other threads: Python expects its handler in the
/// main thread, and a user's handler should not interrupt an unknown thread.
class BlockSignals {
 public:
  BlockSignals() {
    sigset_t all;
    sigfillset(&all);
    for (int const fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&all, fault);  // else they kill without handler
    pthread_sigmask(SIG_SETMASK, &all, &old_);
  }
  ~BlockSignals() { pthread_sigmask(SIG_SETMASK, &old_, nullptr); }
  BlockSignals(BlockSignals const&) = delete;
  BlockSignals& operator=(BlockSignals const&) = delete;

 private:
  sigset_t old_;
};

}  // namespace flashcute
