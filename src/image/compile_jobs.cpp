#include "image/compile_jobs.hpp"

#include <algorithm>
#include <charconv>
#include <fstream>
#include <string>
#include <string_view>
#include <vector>

#include "cpu/cores.hpp"
#include "system/cgroups.hpp"
#include "system/environment.hpp"

namespace flashcute {
namespace {

// Memory that NVRTC needs for one kernel: 0.4 to 0.7 GB by benchmarks/results/compile_cost.jsonl.
constexpr std::uint64_t bytes_per_job = std::uint64_t{1} << 30;

std::optional<std::uint64_t> number_in(std::string_view text) {
  std::uint64_t value = 0;
  auto const [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() ? std::optional(value) : std::nullopt;  // cgroup v2 says "max" for no limit
}

/// The number after `name` and any spaces, at the beginning of a line of the file.
std::optional<std::uint64_t> field(std::filesystem::path const& file, std::string_view name) {
  std::ifstream lines{file};
  for (std::string line; std::getline(lines, line);) {
    if (!line.starts_with(name)) continue;
    std::string_view rest = std::string_view(line).substr(name.size());
    rest.remove_prefix(std::min(rest.find_first_not_of(' '), rest.size()));
    return number_in(rest);
  }
  return std::nullopt;
}

/// The memory that a group's limit leaves. Its use includes cached pages of files, which the kernel frees on demand.
std::optional<std::uint64_t> left_in(Cgroup const& group) {
  auto const limit = number_in(first_line(group.folder / (group.v2 ? "memory.max" : "memory.limit_in_bytes")));
  auto const used = number_in(first_line(group.folder / (group.v2 ? "memory.current" : "memory.usage_in_bytes")));
  if (!limit || !used) return std::nullopt;
  auto const cached = field(group.folder / "memory.stat", group.v2 ? "inactive_file " : "total_inactive_file ");
  std::uint64_t const held = *used - std::min(*used, cached.value_or(0));
  return *limit - std::min(*limit, held);
}

}  // namespace

std::optional<std::uint64_t> available_memory(std::filesystem::path const& root) {
  std::optional<std::uint64_t> least;
  if (auto const kibibytes = field(root / "proc/meminfo", "MemAvailable:")) least = *kibibytes * 1024;
  for (Cgroup const& group : cgroups(root, "memory")) {
    if (auto const left = left_in(group)) least = std::min(least.value_or(*left), *left);
  }
  return least;
}

int compile_jobs() {
  if (auto const chosen = jit_jobs()) return *chosen;
  auto const cores = static_cast<std::uint64_t>(std::max(1, cpu::available_cpus()));
  std::uint64_t const fit = available_memory("/").value_or(cores * bytes_per_job) / bytes_per_job;
  return static_cast<int>(std::clamp<std::uint64_t>(fit, 1, cores));
}

}  // namespace flashcute
