// Environment variables: no other file reads any. The documentation and the `info` command print the table that the
// getters use.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>

namespace flashcute {

class EnvironmentSnapshot;

struct Variable {
  char const* name;
  char const* default_value;  // in words where it is computed
  char const* meaning;
};

std::span<Variable const> variables();

/// The value of any variable, or ""; from this thread's EnvironmentSnapshot, if it has one.
std::string environment_value(char const* name);

/// For threads that work for a call: while an object lives, its thread sees the EnvironmentSnapshot of the calling
/// thread.
class SharedEnvironment {
 public:
  explicit SharedEnvironment(EnvironmentSnapshot const* callers);
  ~SharedEnvironment();
  SharedEnvironment(SharedEnvironment const&) = delete;
  SharedEnvironment& operator=(SharedEnvironment const&) = delete;

 private:
  EnvironmentSnapshot const* own_;
};

/// The EnvironmentSnapshot of the calling thread, or null.
EnvironmentSnapshot const* environment_snapshot();

/// What the user set, or "" if nothing; a variable set to "" counts as not set. `name` must be in the table. Each call
/// reads it again: variables may change between calls, but not during one.
std::string env(char const* name);

// Typed getters. A value that is not allowed raises an ArgumentError with variable, value and allowed values.

enum class JitMode : std::uint8_t { off, on, fastest, force };
JitMode jit_mode();

/// FLASHCUTE_JIT_JOBS, or nothing: compile_jobs then decides by cores and memory.
std::optional<int> jit_jobs();

/// FLASHCUTE_CACHE_DIR, else flashcute below $XDG_CACHE_HOME or ~/.cache; empty where the user has no home.
std::filesystem::path cache_folder();

/// FLASHCUTE_CACHE_SIZE in bytes, 1 GiB if it is not set.
std::uint64_t cache_limit();

/// FLASHCUTE_NUM_THREADS, or nothing: the caller chooses.
std::optional<int> cpu_threads();

/// FLASHCUTE_CPU_ISA: "auto", "baseline", "avx2" or "avx512".
std::string cpu_isa();

bool quiet();

}  // namespace flashcute
