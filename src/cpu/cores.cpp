#include "cores.hpp"

#include <algorithm>
#include <atomic>
#include <charconv>
#include <cstdlib>
#include <fstream>
#include <sstream>
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

#include "block_signals.hpp"
#include "environment.hpp"

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

/// Whether the user asks OpenMP to pin threads. Only then are its runtimes asked for their places, because to ask
/// LLVM's is to start it.
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
    // On a thread of its own: LLVM's runtime pins whoever asks.
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

/// What the OpenMP runtimes said of a mask.
struct Answer {
  CpuSet mask, cores;
};

// The last answer that any thread got, for children of fork: there no lock may be taken that another thread of the
// parent might have held. It is never freed, and so not replaced for ever.
std::atomic<Answer const*> last_answer{nullptr};
std::atomic<int> answers_left{64};
std::atomic<bool> is_forked_child{false};
[[maybe_unused]] int const fork_handler = pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });

}  // namespace

CpuSet cores() {
  CpuSet const mask = CpuSet::of_this_thread();
  if (!openmp_may_pin()) return mask;
  // A runtime that pins this thread changes its mask: only then there is something new to ask. To ask takes the lock of
  // the dynamic loader, which a fork leaves locked in the child if it comes meanwhile.
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

std::string first_line(std::filesystem::path const& file) {
  std::string line;
  std::getline(std::ifstream{file} >> std::ws, line);
  return line;
}

std::vector<std::string> words_of(std::string const& line, char separator = ' ') {
  std::vector<std::string> words;
  std::istringstream stream{line};
  for (std::string word; std::getline(stream, word, separator);) words.push_back(word);
  return words;
}

bool lists(std::string const& names, std::string const& name) {
  auto const all = words_of(names, ',');
  return std::find(all.begin(), all.end(), name) != all.end();
}

/// quota / period in whole CPUs, rounded up; 0 where that is no limit ("max", -1, no such file).
int whole_cpus(std::string const& quota, std::string const& period) {
  long long q = 0, p = 0;
  std::from_chars(quota.data(), quota.data() + quota.size(), q);
  std::from_chars(period.data(), period.data() + period.size(), p);
  if (q <= 0 || p <= 0) return 0;
  return static_cast<int>(std::min<long long>((q - 1) / p + 1, INT_MAX));
}

/// The limit of one cgroup; 0: none.
int limit_of(std::filesystem::path const& group, bool v2) {
  if (!v2) return whole_cpus(first_line(group / "cpu.cfs_quota_us"), first_line(group / "cpu.cfs_period_us"));
  auto const words = words_of(first_line(group / "cpu.max"));
  return words.size() == 2 ? whole_cpus(words[0], words[1]) : 0;
}

/// Where a hierarchy of cgroups that knows CPU quotas is mounted, and the process's group in it.
struct Hierarchy {
  bool v2;
  std::string group;  // as /proc/self/cgroup names it
};

std::vector<Hierarchy> hierarchies(std::filesystem::path const& root) {
  std::vector<Hierarchy> all;
  std::ifstream file{root / "proc/self/cgroup"};
  for (std::string line; std::getline(file, line);) {  // number:controllers:group
    size_t const first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    std::string const controllers = line.substr(first + 1, second - first - 1);
    if (controllers.empty() || lists(controllers, "cpu")) all.push_back({controllers.empty(), line.substr(second + 1)});
  }
  return all;
}

}  // namespace

std::optional<int> cpu_quota(std::filesystem::path const& root) {
  int least = 0;
  auto const groups = hierarchies(root);
  std::ifstream mounts{root / "proc/self/mountinfo"};
  for (std::string line; std::getline(mounts, line);) {
    // 36 35 98:0 /group /mount/point options ... - type source options
    size_t const dash = line.find(" - ");
    if (dash == std::string::npos) continue;
    auto const left = words_of(line.substr(0, dash)), right = words_of(line.substr(dash + 3));
    if (left.size() < 5 || right.size() < 3) continue;
    bool const v2 = right[0] == "cgroup2";
    if (!v2 && !(right[0] == "cgroup" && lists(right[2], "cpu"))) continue;
    for (Hierarchy const& h : groups) {
      if (h.v2 != v2) continue;
      // The mount shows the hierarchy from left[3] down, which in a container may be the process's own group.
      std::filesystem::path below = std::filesystem::path(h.group).lexically_relative(left[3]);
      if (below.empty() || *below.begin() == ".." || *below.begin() == ".") below.clear();
      std::filesystem::path const top = root / std::filesystem::path(left[4]).relative_path();
      // The groups above limit it, too.
      for (std::filesystem::path at = below;; at = at.parent_path()) {
        int const limit = limit_of(at.empty() ? top : top / at, v2);
        if (limit > 0) least = least == 0 ? limit : std::min(least, limit);
        if (at.empty()) break;
      }
    }
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
