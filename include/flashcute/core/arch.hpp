// The limits of each compute capability on which the rules and the defaults of configurations depend.
#pragma once

#include "flashcute/core/std.hpp"

namespace flashcute {

/// Where a configuration is to run: 0 is the CPU backend, otherwise a GPU's compute capability * 10.
using Arch = int32_t;
inline constexpr Arch cpu_arch = 0;

/// Threads that a multiprocessor holds at once.
constexpr int32_t max_threads_per_sm(Arch arch) {
  switch (arch) {
    case 86:
    case 87:
    case 89:
    case 120:
    case 121: return 1536;
    default: return 2048;
  }
}

/// Shared memory that one thread block may have, in bytes.
constexpr int32_t max_smem_bytes(Arch arch) {
  switch (arch) {
    case 80:
    case 87: return 163 * 1024;
    case 86:
    case 89:
    case 120:
    case 121: return 99 * 1024;
    default: return 227 * 1024;
  }
}

/// Shared memory of a multiprocessor, in bytes. CUDA reserves 1 KiB of it for each resident thread block.
constexpr int32_t max_smem_bytes_per_sm(Arch arch) { return max_smem_bytes(arch) + 1024; }
inline constexpr int32_t reserved_smem_bytes = 1024;

}  // namespace flashcute
