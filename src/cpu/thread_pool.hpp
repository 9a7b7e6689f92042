// A thread pool of the library's own, not OpenMP: GNU's runtime (libgomp) hangs in a child that was forked after its
// use, and data loaders run in forked children.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace flashcute::cpu {

/// Calls task(context, index) for every index in [0, count), on up to `threads` threads, one of which is the caller;
/// the others run on the caller's cores() (cores.hpp). Every task runs in the default floating-point mode. Indices are
/// handed out in order, one by one. Returns when all are done, or throws one of the exceptions that the tasks threw
/// (indices not yet started are then skipped).
///
/// Threads start at first use, sleep between calls, and are never joined. A call from inside a task, or during another
/// thread's call, runs on its own thread alone. After fork the child starts without threads.
void parallel_for(int64_t count, int threads, void (*task)(void* context, int64_t index), void* context);

template <class F>
void parallel_for(int64_t count, int threads, F&& f) {
  auto const task = [](void* context, int64_t index) { (*static_cast<std::remove_reference_t<F>*>(context))(index); };
  parallel_for(count, threads, task, const_cast<void*>(static_cast<void const*>(std::addressof(f))));
}

}  // namespace flashcute::cpu
