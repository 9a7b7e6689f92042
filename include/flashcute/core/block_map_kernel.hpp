// The identity of the kernel that makes block maps.
#pragma once

#include "flashcute/core/block_map.hpp"
#include "flashcute/core/kernel_id.hpp"

namespace flashcute {

/// There is one kernel: rules, sizes and directions are data.
struct BlockMapKernelId {
  constexpr bool operator==(BlockMapKernelId const&) const = default;
};

// A thread for each row of a cell, of several cells at once.
inline constexpr int32_t groups_of_map = 4;
inline constexpr int32_t threads_of_map = groups_of_map * cell_size;
inline constexpr int32_t warps_of_map = threads_of_map / 32;
inline constexpr int32_t blocks_of_map = 4;  // at least, on a multiprocessor at once: more reads are then in flight

constexpr int32_t num_threads(BlockMapKernelId) { return threads_of_map; }

/// Dynamic shared memory: the elements of a word of cells, and some numbers of each.
constexpr int64_t smem_bytes(BlockMapKernelId) {
  return int64_t{cells_of_word} * cell_size * 8 + 2 * (cells_of_word + 1) * 4 + (2 * warps_of_map + 2) * 4;
}

constexpr size_t hash_of(BlockMapKernelId) { return 0; }

constexpr Name name(BlockMapKernelId) {
  Name s;
  s << "flashcute_make_block_map";
  return s;
}

}  // namespace flashcute
