// Threads for the parts of one call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu/cores.hpp"
#include "system/block_signals.hpp"
#include "system/environment.hpp"

namespace flashcute {

/// Calls work(0) to work(count - 1), up to `most` of them at the same time, and returns when all are done. The first
/// exception, which keeps what has not begun from beginning, is thrown then. The threads see the caller's environment,
/// may use all cores although the caller is pinned to one, and run no signal's handler.
template <class Work>
void run_at_once(std::size_t count, std::size_t most, Work const& work) {
  std::size_t const workers = std::min(count, most);
  if (workers <= 1) {
    for (std::size_t i = 0; i < count; ++i) work(i);
    return;
  }
  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  std::exception_ptr failure;
  EnvironmentSnapshot const* const environment = environment_snapshot();
  cpu::CpuSet const cores = cpu::cores();
  auto const take_turns = [&] {
    SharedEnvironment const shared(environment);
    if (cores.count() > 0) cores.bind_this_thread();
    for (std::size_t i = next++; i < count; i = next++) {
      try {
        work(i);
      } catch (...) {
        std::lock_guard const guard(mutex);
        if (!failure) failure = std::current_exception();
        next = count;
      }
    }
  };
  {
    std::vector<std::jthread> threads;
    try {
      // Not longer: while it waits, this thread takes the signals that come, and no other thread of the program has to.
      BlockSignals const blocked;
      for (std::size_t i = 0; i < workers; ++i) threads.emplace_back(take_turns);
    } catch (std::system_error const&) {  // the system gives no more threads
      if (threads.empty()) throw;
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace flashcute
