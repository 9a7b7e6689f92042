#include "system/environment.hpp"

#include <pwd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <string_view>
#include <utility>
#include <vector>

#include "flashcute/api.hpp"
#include "flashcute/error.hpp"

namespace flashcute {
namespace {

thread_local EnvironmentSnapshot const* snapshot = nullptr;

// Variables of other programs that flashcute reads too.
constexpr std::string_view foreign[] = {"HOME",          "XDG_CACHE_HOME", "CUDA_HOME",         "CUDA_PATH",
                                        "OMP_PROC_BIND", "OMP_PLACES",     "GOMP_CPU_AFFINITY", "KMP_AFFINITY"};

/// Whether a variable whose name begins with this letter may be one that flashcute reads. Every call looks at the whole
/// environment, which may hold hundreds of variables: of most it looks at this letter alone.
constexpr bool may_be_read(char first_letter) {
  for (std::string_view const name : foreign) {
    if (name.front() == first_letter) return true;
  }
  return first_letter == 'F';
}

constexpr std::array table = {
    Variable{"FLASHCUTE_JIT", "on",
             "off: never compile at run time, nor take what was compiled before; on: compile where no image is at hand "
             "that serves the call; fastest: also where one is, but of a slower kernel; force: never use an "
             "ahead-of-time image"},
    Variable{"FLASHCUTE_JIT_JOBS", "one per available core and GiB of available memory",
             "how many kernels a process compiles at the same time"},
    Variable{"FLASHCUTE_CACHE_DIR", "$XDG_CACHE_HOME/flashcute, else ~/.cache/flashcute",
             "folder of the images that were compiled at run time (an absolute path)"},
    Variable{"FLASHCUTE_CACHE_SIZE", "1G",
             "how large these images may be together, in bytes or with a unit: K, M, G or T (powers of 1024). Those "
             "used least recently are removed when one is compiled; with 0 it alone stays"},
    Variable{"FLASHCUTE_NVRTC", "searched", "path of libnvrtc.so, the run-time compiler"},
    Variable{"FLASHCUTE_CUDA_INCLUDE", "searched", "folder that holds cuda_fp16.h, for the run-time compiler"},
    Variable{"FLASHCUTE_NUM_THREADS", "one per available core", "threads of the CPU backend"},
    Variable{"FLASHCUTE_CPU_ISA", "auto", "instruction set of the CPU backend: auto, baseline, avx2 or avx512"},
    Variable{"FLASHCUTE_QUIET", "0", "1: no messages on stderr while compiling"},
};

/// The variable's value, which must be one of `allowed`; the first is the default.
std::string choice(char const* name, std::initializer_list<char const*> allowed) {
  std::string const value = env(name);
  if (value.empty()) return *allowed.begin();
  if (std::find(allowed.begin(), allowed.end(), value) != allowed.end()) return value;
  std::string list;
  for (char const* a : allowed) list += (list.empty() ? "" : ", ") + std::string(a);
  throw ArgumentError("environment variable " + std::string(name), "one of " + list, "'" + value + "'");
}

/// The variable's value, a number of threads or processes; nothing if it is not set.
std::optional<int> whole_number(char const* name) {
  std::string const value = env(name);
  if (value.empty()) return std::nullopt;
  int count = 0;
  auto const [end, error] = std::from_chars(value.data(), value.data() + value.size(), count);
  if (error != std::errc() || end != value.data() + value.size() || count < 1 || count > 1024) {
    throw ArgumentError("environment variable " + std::string(name), "a whole number from 1 to 1024",
                        "'" + value + "'");
  }
  return count;
}

std::filesystem::path home_folder() {
  if (std::string const home = environment_value("HOME"); home.starts_with('/')) return home;
  passwd entry{};
  passwd* found = nullptr;
  std::vector<char> buffer(16384);
  if (getpwuid_r(geteuid(), &entry, buffer.data(), buffer.size(), &found) != 0 || found == nullptr) return {};
  return found->pw_dir;
}

}  // namespace

EnvironmentSnapshot::EnvironmentSnapshot() : outer_{snapshot} {
  if (outer_ != nullptr) return;  // reads go to the outer one; the environment may be changing
  for (char const* const* entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    if (!may_be_read(**entry)) continue;
    std::string_view const text = *entry;
    std::string_view const name = text.substr(0, text.find('='));
    bool const wanted =
        name.starts_with("FLASHCUTE_") || std::find(std::begin(foreign), std::end(foreign), name) != std::end(foreign);
    if (wanted) entries_.emplace_back(text);
  }
  snapshot = this;
}

EnvironmentSnapshot::~EnvironmentSnapshot() { snapshot = outer_; }

std::string EnvironmentSnapshot::value(std::string_view name) const {
  for (std::string const& entry : entries_) {
    if (entry.size() > name.size() && entry[name.size()] == '=' && entry.starts_with(name)) {
      return entry.substr(name.size() + 1);
    }
  }
  return "";
}

SharedEnvironment::SharedEnvironment(EnvironmentSnapshot const* callers) : own_{std::exchange(snapshot, callers)} {}
SharedEnvironment::~SharedEnvironment() { snapshot = own_; }

EnvironmentSnapshot const* environment_snapshot() { return snapshot; }

std::string environment_value(char const* name) {
  if (snapshot != nullptr) return snapshot->value(name);
  char const* const value = std::getenv(name);
  return value == nullptr ? "" : value;
}

std::span<Variable const> variables() { return table; }

std::string env(char const* name) {
  auto const is_it = [&](Variable const& v) { return v.name == std::string_view(name); };
  bool const known = std::any_of(table.begin(), table.end(), is_it);
  if (!known) throw ArgumentError("env: " + std::string(name) + " is not in the table of environment variables");
  return environment_value(name);
}

JitMode jit_mode() {
  std::string const mode = choice("FLASHCUTE_JIT", {"on", "off", "fastest", "force"});
  if (mode == "off") return JitMode::off;
  if (mode == "fastest") return JitMode::fastest;
  return mode == "force" ? JitMode::force : JitMode::on;
}

std::optional<int> jit_jobs() { return whole_number("FLASHCUTE_JIT_JOBS"); }

std::filesystem::path cache_folder() {
  if (std::string const folder = env("FLASHCUTE_CACHE_DIR"); !folder.empty()) {
    // A relative path would mean another folder after each chdir, and a ~ in quotes is not expanded by the shell.
    if (folder[0] != '/') {
      throw ArgumentError("environment variable FLASHCUTE_CACHE_DIR", "an absolute path", "'" + folder + "'");
    }
    return folder;
  }
  // The XDG base directory specification says to ignore a relative path.
  if (std::string const xdg = environment_value("XDG_CACHE_HOME"); xdg.starts_with('/')) {
    return std::filesystem::path(xdg) / "flashcute";
  }
  std::filesystem::path const home = home_folder();
  return home.empty() ? home : home / ".cache" / "flashcute";
}

std::uint64_t cache_limit() {
  std::string value = env("FLASHCUTE_CACHE_SIZE");
  if (value.empty()) value = "1G";
  constexpr std::string_view units = "KMGT";
  std::uint64_t count = 0;
  auto const [end, error] = std::from_chars(value.data(), value.data() + value.size(), count);
  std::string_view const unit(end, value.data() + value.size());
  std::size_t const power = unit.size() == 1 ? units.find(unit) + 1 : 0;  // 0 also for a unit that is not found
  std::uint64_t const factor = std::uint64_t{1} << (10 * power);
  if (error != std::errc() || (!unit.empty() && power == 0) || count > (UINT64_MAX >> 1) / factor) {
    throw ArgumentError("environment variable FLASHCUTE_CACHE_SIZE",
                        "a whole number of bytes, or one with a unit K, M, G or T such as 512M", "'" + value + "'");
  }
  return count * factor;
}

std::optional<int> cpu_threads() { return whole_number("FLASHCUTE_NUM_THREADS"); }

std::string cpu_isa() { return choice("FLASHCUTE_CPU_ISA", {"auto", "baseline", "avx2", "avx512"}); }

bool quiet() { return choice("FLASHCUTE_QUIET", {"0", "1"}) == "1"; }

}  // namespace flashcute
