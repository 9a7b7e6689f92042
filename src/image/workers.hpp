// Runs the parts of one call on several threads.
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

/// Calls work(0) to work(count - 1), up to `most` of them at the same time, and returns when all are done. After an
/// exception no further part begins, and the first exception is thrown at the end. The threads see the caller's
/// EnvironmentSnapshot, may use all of cpu::cores() even if the caller is pinned to one, and run no signal handlers.
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
      // Only while threads start: this thread must handle signals while it waits, or no thread of the program may.
      BlockSignals const blocked;
      for (std::size_t i = 0; i < workers; ++i) threads.emplace_back(take_turns);
    } catch (std::system_error const&) {  // the system gives no more threads
      if (threads.empty()) throw;
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace flashcute
