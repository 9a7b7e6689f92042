#include "cpu/cores.hpp"

#include <algorithm>
#include <atomic>
#include <charconv>
#include <cstdlib>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <sched.h>
#endif

#include "system/block_signals.hpp"
#include "system/cgroups.hpp"
#include "system/environment.hpp"

namespace flashcute::cpu {

#if defined(__linux__)

CpuSet CpuSet::of_this_thread() {
  CpuSet set;
  if (sched_getaffinity(0, sizeof set.words_, reinterpret_cast<cpu_set_t*>(set.words_.data())) != 0) set.words_ = {};
  return set;
}

bool CpuSet::bind_this_thread() const {
  return sched_setaffinity(0, sizeof words_, reinterpret_cast<cpu_set_t const*>(words_.data())) == 0;
}

namespace {

// ---- OpenMP --------------------------------------------------------------------------------------------

/// Whether the user asks OpenMP to pin threads. Only then are its runtimes asked for their places, because asking
/// LLVM's starts it.
bool openmp_may_pin() {
  for (char const* name : {"OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"}) {
    if (!environment_value(name).empty()) return true;
  }
  return false;
}

/// The OpenMP runtimes in the process: GNU's, Intel's and LLVM's, also under names such as libgomp-1a2b3c.so.1.
std::vector<std::string> openmp_runtimes() {
  std::vector<std::string> found;
  auto const look = [](dl_phdr_info* info, size_t, void* to) {
    std::string_view const path = info->dlpi_name;
    std::string_view const file = path.substr(path.rfind('/') + 1);
    for (char const* name : {"libgomp", "libiomp", "libomp"}) {
      if (file.starts_with(name)) static_cast<std::vector<std::string>*>(to)->emplace_back(path);
    }
    return 0;
  };
  dl_iterate_phdr(look, &found);
  return found;
}

void add_places(std::string const& runtime, std::vector<CpuSet>& places) {
  void* const library = dlopen(runtime.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return;
  // https://www.openmp.org/spec-html/5.0/openmpse44.html
  auto const count = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_num_places"));
  auto const size = reinterpret_cast<int (*)(int)>(dlsym(library, "omp_get_place_num_procs"));
  auto const read = reinterpret_cast<void (*)(int, int*)>(dlsym(library, "omp_get_place_proc_ids"));
  if (count != nullptr && size != nullptr && read != nullptr) {
    for (int place = 0; place < count(); ++place) {
      std::vector<int> cpus(static_cast<size_t>(std::max(0, size(place))));
      read(place, cpus.data());
      CpuSet set;
      for (int const cpu : cpus) set.add(cpu);
      places.push_back(set);
    }
  }
  dlclose(library);
}

/// Every CPU of every place, if `mask` is one of the places; else `mask`.
CpuSet unpinned(CpuSet const& mask) {
  std::vector<CpuSet> places;
  try {
    BlockSignals const blocked;
    // On a thread of its own: LLVM's runtime pins the thread that asks.
    std::thread{[&] {
      for (std::string const& runtime : openmp_runtimes()) add_places(runtime, places);
    }}.join();
  } catch (std::system_error const&) {
    return mask;  // the system gives no more threads
  }
  if (std::find(places.begin(), places.end(), mask) == places.end()) return mask;
  CpuSet all;
  for (CpuSet const& place : places) all.add(place);
  return all;
}

}  // namespace

namespace {

/// The cores that the OpenMP runtimes allow for a mask.
struct Answer {
  CpuSet mask, cores;
};

// The last answer that any thread got, for forked children: they may take no lock that another thread of the parent
// might have held. An answer is never freed, because another thread may read it, so their number is limited.
std::atomic<Answer const*> last_answer{nullptr};
std::atomic<int> answers_left{64};
std::atomic<bool> is_forked_child{false};
[[maybe_unused]] int const fork_handler = pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });

}  // namespace

CpuSet cores() {
  CpuSet const mask = CpuSet::of_this_thread();
  if (!openmp_may_pin()) return mask;
  // Only a new mask needs a new answer: a runtime that pins this thread changes its mask. Asking takes the lock of the
  // dynamic loader, and a fork in that moment would leave it locked in the child.
  thread_local Answer known;
  if (known.mask == mask) return known.cores;
  if (is_forked_child) {
    Answer const* const last = last_answer.load(std::memory_order_acquire);
    return last != nullptr && last->mask == mask ? last->cores : mask;
  }
  known = {mask, unpinned(mask)};
  if (answers_left.fetch_sub(1) > 0) last_answer.store(new Answer(known), std::memory_order_release);
  return known.cores;
}

#else

CpuSet CpuSet::of_this_thread() { return {}; }
bool CpuSet::bind_this_thread() const { return false; }
CpuSet cores() { return {}; }

#endif

// ---- quotas ----------------------------------------------------------------------------------------------

namespace {

/// quota / period in whole CPUs, rounded up; 0 where that is no limit ("max", -1, no such file).
int whole_cpus(std::string const& quota, std::string const& period) {
  long long q = 0, p = 0;
  std::from_chars(quota.data(), quota.data() + quota.size(), q);
  std::from_chars(period.data(), period.data() + period.size(), p);
  if (q <= 0 || p <= 0) return 0;
  return static_cast<int>(std::min<long long>((q - 1) / p + 1, INT_MAX));
}

/// 0: none.
int limit_of(Cgroup const& group) {
  if (!group.v2) {
    return whole_cpus(first_line(group.folder / "cpu.cfs_quota_us"), first_line(group.folder / "cpu.cfs_period_us"));
  }
  auto const words = words_of(first_line(group.folder / "cpu.max"));
  return words.size() == 2 ? whole_cpus(words[0], words[1]) : 0;
}

}  // namespace

std::optional<int> cpu_quota(std::filesystem::path const& root) {
  int least = 0;
  for (Cgroup const& group : cgroups(root, "cpu")) {
    int const limit = limit_of(group);
    if (limit > 0) least = least == 0 ? limit : std::min(least, limit);
  }
  return least > 0 ? std::optional(least) : std::nullopt;
}

int available_cpus() {
  int count = cores().count();
  if (count == 0) count = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  // Not a function-local static: its lock, held by another thread at a fork, would hang the child.
  static std::atomic<int> quota{0};
  int limit = quota.load(std::memory_order_relaxed);
  if (limit == 0) quota = limit = cpu_quota("/").value_or(INT_MAX);
  return std::min(count, limit);
}

}  // namespace flashcute::cpu
