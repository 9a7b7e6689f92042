#include "cpu/thread_pool.hpp"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include "cpu/cores.hpp"
#include "cpu/float_mode.hpp"
#include "system/block_signals.hpp"

namespace flashcute::cpu {
namespace {

/// One call of parallel_for. It lives on the caller's stack.
struct Job {
  int64_t const count;
  void (*const task)(void* context, int64_t index);
  void* const context;
  CpuSet cores;  // for the pool's threads
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;

  Job(int64_t count, void (*task)(void* context, int64_t index), void* context)
      : count{count}, task{task}, context{context} {}

  void work() {
    DefaultFloatMode const mode;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      try {
        task(context, i);
      } catch (...) {
        next.store(count, std::memory_order_relaxed);
        std::lock_guard const lock{mutex};
        if (!error) error = std::current_exception();
      }
    }
  }
};

thread_local bool inside_job = false;

void work_inside(Job& job) {
  inside_job = true;
  job.work();
  inside_job = false;
}

class Pool {
 public:
  /// False, and nothing done, if another call is using the pool.
  bool try_run(Job& job, int threads) {
    std::unique_lock const in_use{in_use_, std::try_to_lock};
    if (!in_use) return false;
    job.cores = cores();
    {
      std::lock_guard const lock{mutex_};
      start(threads - 1);
      job_ = &job;
      seats_ = threads - 1;
      ++generation_;
    }
    posted_.notify_all();
    work_inside(job);
    std::unique_lock lock{mutex_};
    job_ = nullptr;  // a thread that wakes up only now does not join
    left_.wait(lock, [&] { return working_ == 0; });
    return true;
  }

 private:
  void start(int wanted) {
    BlockSignals const blocked;
    try {
      for (; started_ < wanted; ++started_) std::thread{[this] { serve(); }}.detach();
    } catch (std::system_error const&) {
      // The system gives no more threads: those that exist do the work.
    }
  }

  [[noreturn]] void serve() {
    uint64_t seen = 0;
    CpuSet bound;
    std::unique_lock lock{mutex_};
    while (true) {
      posted_.wait(lock, [&] { return job_ != nullptr && generation_ != seen; });
      seen = generation_;
      if (seats_ == 0) continue;
      --seats_;
      ++working_;
      Job& job = *job_;
      lock.unlock();
      if (job.cores != bound) {  // a new thread has the mask of the thread that created it
        job.cores.bind_this_thread();
        bound = job.cores;
      }
      work_inside(job);
      lock.lock();
      if (--working_ == 0) left_.notify_one();
    }
  }

  std::mutex in_use_;  // held for the length of a call
  std::mutex mutex_;   // guards what follows
  std::condition_variable posted_, left_;
  Job* job_ = nullptr;
  uint64_t generation_ = 0;
  int seats_ = 0;  // how many more threads may join the job
  int working_ = 0;
  int started_ = 0;
};

// The pool is never destroyed: its threads sleep in it until the process ends. After fork the child constructs a new
// one in the same memory. The old one cannot be destroyed, because threads that the child does not have may hold its
// locks and wait on its condition variables.
alignas(Pool) unsigned char pool_storage[sizeof(Pool)];
Pool* pool = new (pool_storage) Pool;

[[maybe_unused]] int const fork_handler = pthread_atfork(nullptr, nullptr, [] { pool = new (pool_storage) Pool; });

}  // namespace

void parallel_for(int64_t count, int threads, void (*task)(void* context, int64_t index), void* context) {
  Job job{count, task, context};
  int const useful = static_cast<int>(std::min<int64_t>(threads, count));
  if (useful <= 1 || inside_job || !pool->try_run(job, useful)) job.work();
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace flashcute::cpu
