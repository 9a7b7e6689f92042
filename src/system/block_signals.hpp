// For threads that must never run a signal's handler.
#pragma once

#include <signal.h>

namespace flashcute {

/// All signals are blocked while one lives, but those of a thread's own faults, so that threads started meanwhile never
/// run another thread's handler: Python's expects the main thread, and users' interrupt what they do not know.
class BlockSignals {
 public:
  BlockSignals() {
    sigset_t all;
    sigfillset(&all);
    for (int const fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&all, fault);  // blocked, they kill unseen
    pthread_sigmask(SIG_SETMASK, &all, &old_);
  }
  ~BlockSignals() { pthread_sigmask(SIG_SETMASK, &old_, nullptr); }
  BlockSignals(BlockSignals const&) = delete;
  BlockSignals& operator=(BlockSignals const&) = delete;

 private:
  sigset_t old_;
};

}  // namespace flashcute
