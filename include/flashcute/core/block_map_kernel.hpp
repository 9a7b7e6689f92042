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

/// Dynamic shared memory: the elements of a word of cells, the documents of their columns, and some numbers of each.
constexpr int64_t smem_bytes(BlockMapKernelId) {
  return int64_t{cells_of_word} * cell_size * (8 + 4) + 2 * cells_of_word * 4 + (2 * warps_of_map + 2) * 4;
}

/// Which word of cells a thread block makes: that of a row of cells, by query or by key. Those of a square of 32 x 32
/// cells come one after another in both directions: what one of them reads, the others find in the level 2 cache.
struct MapBlockOrder {
  int32_t by_query, by_key;  // thread blocks of a square
  int32_t down, across;      // squares of a map
  int64_t count;             // of thread blocks, those included that have no row

  struct Place {
    int64_t map;
    int32_t row, word;  // the row may lie behind the last: then there is no such word
    bool by_key;
  };

  FLASHCUTE_HD static constexpr MapBlockOrder of(BlockMapSizes const& sizes) {
    int32_t const queries = count_cells(sizes.seqlen_q), keys = count_cells(sizes.seqlen_k);
    MapBlockOrder o{min_of(queries, cells_of_word), min_of(keys, cells_of_word), ceil_div(queries, cells_of_word),
                    ceil_div(keys, cells_of_word), 0};
    o.count = sizes.maps * o.down * o.across * (o.by_query + o.by_key);
    return o;
  }

  FLASHCUTE_HD constexpr Place place(uint32_t block) const {
    auto const of_square = static_cast<uint32_t>(by_query + by_key);
    uint32_t const square = block / of_square, of_map = square / static_cast<uint32_t>(across);
    auto const i = static_cast<int32_t>(block % of_square),
               right = static_cast<int32_t>(square % static_cast<uint32_t>(across));
    auto const below = static_cast<int32_t>(of_map % static_cast<uint32_t>(down));
    auto const map = static_cast<int64_t>(of_map / static_cast<uint32_t>(down));
    if (i < by_query) return {map, below * cells_of_word + i, right, false};
    return {map, right * cells_of_word + i - by_query, below, true};
  }
};

constexpr size_t hash_of(BlockMapKernelId) { return 0; }

constexpr Name name(BlockMapKernelId) {
  Name s;
  s << "flashcute_make_block_map";
  return s;
}

}  // namespace flashcute
