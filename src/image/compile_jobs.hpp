// How many kernels may be compiled at the same time.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>

namespace flashcute {

/// FLASHCUTE_JIT_JOBS; without it, one for each core that this thread may use and each GiB of available memory, but at
/// least one. What is available is asked anew in each call.
int compile_jobs();

/// The bytes that the calling process can still use: what the system has, but no more than the memory limits of its
/// control groups leave it. Nothing where the system does not say. `root` stands for "/".
std::optional<std::uint64_t> available_memory(std::filesystem::path const& root);

}  // namespace flashcute
