// Threads of our own: OpenMP's runtime hangs in a forked child, and a child of fork is where data
// loaders run.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace flashcute::cpu {

/// Calls task(context, index) for every index in [0, count), on up to `threads` threads of which the
/// caller is one, and the others run on the caller's cores() (cores.hpp). Every task runs in the default
/// floating-point mode. Indices are handed out in order, one by one. Returns when all have been done, or
/// throws one of the exceptions that the tasks threw (the indices not yet started are then skipped).
///
/// Threads start at first use, sleep in between, and are never joined. A call from inside a task, or
/// while another thread's call runs, does its work alone. After fork the child starts with no threads.
void parallel_for(int64_t count, int threads, void (*task)(void* context, int64_t index), void* context);

template <class F>
void parallel_for(int64_t count, int threads, F&& f) {
  auto const task = [](void* context, int64_t index) { (*static_cast<std::remove_reference_t<F>*>(context))(index); };
  parallel_for(count, threads, task, const_cast<void*>(static_cast<void const*>(std::addressof(f))));
}

}  // namespace flashcute::cpu
