// The cores that a call of the CPU backend may use. docs/decisions/0011-cpu-threads.md has the reasons.
#pragma once

#include <array>
#include <climits>
#include <cstddef>
#include <filesystem>
#include <optional>

namespace flashcute::cpu {

/// A set of CPUs by number, with the layout of Linux's cpu_set_t; a Linux kernel supports at most 8192 CPUs.
class CpuSet {
 public:
  void add(int cpu) {
    if (cpu >= 0 && cpu < capacity) words_[word(cpu)] |= bit(cpu);
  }
  void add(CpuSet const& other) {
    for (std::size_t i = 0; i < words_.size(); ++i) words_[i] |= other.words_[i];
  }
  bool has(int cpu) const { return cpu >= 0 && cpu < capacity && (words_[word(cpu)] & bit(cpu)) != 0; }
  int count() const {
    int n = 0;
    for (unsigned long const w : words_) n += __builtin_popcountl(w);
    return n;
  }
  bool operator==(CpuSet const&) const = default;

  /// The affinity mask of the calling thread; empty where the system does not say.
  static CpuSet of_this_thread();

  /// Makes it the calling thread's affinity mask. False if the system refuses.
  bool bind_this_thread() const;

 private:
  static constexpr int capacity = 8192;
  static constexpr int bits = CHAR_BIT * sizeof(unsigned long);
  static std::size_t word(int cpu) { return static_cast<std::size_t>(cpu / bits); }
  static unsigned long bit(int cpu) { return 1ul << (cpu % bits); }

  std::array<unsigned long, capacity / bits> words_{};
};

/// The calling thread's affinity mask, or, where OpenMP has pinned the thread to one of its places, all its places.
CpuSet cores();

/// The CPU quota of the calling process (cgroup v1 and v2, the smallest of all groups) in whole CPUs, rounded up;
/// nothing if there is none. `root` stands for "/".
std::optional<int> cpu_quota(std::filesystem::path const& root);

/// How many threads are worth having: one for each of cores(), but no more than the quota, which is read once.
int available_cpus();

}  // namespace flashcute::cpu
