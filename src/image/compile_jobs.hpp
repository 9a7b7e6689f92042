// How many kernels may be compiled at the same time.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>

namespace flashcute {

/// FLASHCUTE_JIT_JOBS; without it, one per CPU that this thread may use, but at most one per GiB of available memory,
/// and at least one. Each call reads the available memory again.
int compile_jobs();

/// The bytes that the calling process can still use: the system's available memory, or what the memory limits of its
/// control groups leave, whichever is less. Nothing if the system does not say. `root` stands for "/".
std::optional<std::uint64_t> available_memory(std::filesystem::path const& root);

}  // namespace flashcute
