// The kernel that makes block maps of rules. A thread block makes 64 rows of 32 cells, in one direction: a word of each
// plane, and the elements of the partial cells among them. Both directions are made alike, each from the rules.
#pragma once

#include "flashcute/core/block_map_kernel.hpp"
#include "flashcute/device/instructions.hpp"
#include "flashcute/policy/block_map_rules.hpp"

namespace flashcute {

class MakeBlockMap {
 public:
  struct SharedStorage {
    uint64_t seen[cells_of_word][cell_size];  // of each cell, which columns each row sees
    int32_t least[cells_of_word + 1],
        greatest[cells_of_word + 1];  // documents of the cells' columns; last, of the rows
    // Of the cells that a warp looked at: of which one of its rows sees a column, and of which one does not see all.
    uint32_t some[warps_of_map], broken[warps_of_map];
    uint32_t number;
  };
  static_assert(sizeof(SharedStorage) == smem_bytes(BlockMapKernelId{}));

  FLASHCUTE_DEVICE static void run(BlockMapRules const& rules, SharedStorage& smem) {
    BlockMapLayout const layout = BlockMapLayout::of(rules.sizes, rules.capacity);
    int64_t const words_by_query = rules.sizes.maps * layout.by_query.rows * layout.by_query.words;
    int64_t const block = block_index();
    if (block < words_by_query) {
      MakeBlockMap(rules, smem).make<false>(layout.by_query, block);
    } else {
      MakeBlockMap(rules, smem).make<true>(layout.by_key, block - words_by_query);
    }
  }

 private:
  FLASHCUTE_DEVICE MakeBlockMap(BlockMapRules const& rules, SharedStorage& smem) : rules_(rules), smem_(smem) {}

  /// Word `index` of the planes of a direction.
  template <bool by_key>
  FLASHCUTE_DEVICE void make(CellPlanes const& planes, int64_t index) const {
    using Rows = MapRows<by_key>;
    int64_t const row_index = index / planes.words;
    auto const word = static_cast<int32_t>(index % planes.words);
    auto const row_of_cells = static_cast<int32_t>(row_index % planes.rows);
    Rows const rows(rules_, row_index / planes.rows);
    int32_t const thread = thread_index(), row_of_cell = thread % cell_size, group = thread / cell_size;
    int32_t const row = row_of_cells * cell_size + row_of_cell;
    int32_t const first = word * cells_of_word, count = min_of(cells_of_word, count_cells(rows.columns()) - first);

    if (rows.has_documents()) {
      for (int32_t c = thread / 32; c < count; c += warps_of_map) {
        find_range(rows.documents_of_columns(), first + c, rows.columns(), c);
      }
      if (thread < 32) find_range(rows.documents_of_rows(), row_of_cells, rows.rows(), cells_of_word);
      block_sync();  // the numbers of all cells are in shared memory
    }
    uint32_t some = 0, broken = 0;
    for (int32_t c = group; c < count; c += groups_of_map) {
      uint64_t const existing = rows.existing(first + c);
      uint64_t seen = 0;
      int32_t const known = rows.has_documents() ? known_of_documents(rows, c) : unknown;
      if (known == unknown) {
        if (rows.has_booleans()) seen = seen_in_booleans(rows, row, first + c);
        if (row >= rows.rows()) {
          seen = 0;
        } else {
          uint64_t const others = rows.by_other_rules(row, first + c);
          seen = rows.has_booleans() ? seen & others : others;
        }
      } else if (known == all) {
        seen = row < rows.rows() ? existing : 0;
      }
      shared_store(&smem_.seen[c][row_of_cell], seen);
      if (warp_any(seen != 0)) some |= 1u << c;
      if (warp_any(row < rows.rows() && seen != existing)) broken |= 1u << c;
    }
    if (thread % 32 == 0) {
      shared_store(&smem_.some[thread / 32], some);
      shared_store(&smem_.broken[thread / 32], broken);
    }
    block_sync();  // what the rows of all warps see is in shared memory
    some = 0;
    broken = 0;
    CUTE_UNROLL
    for (int32_t i = 0; i < warps_of_map; ++i) {
      some |= shared_load<uint32_t>(&smem_.some[i]);
      broken |= shared_load<uint32_t>(&smem_.broken[i]);
    }
    uint32_t const whole = some & ~broken;
    uint32_t const partial = some & ~whole;
    if (thread == 0) {
      uint32_t const number =
          partial == 0 ? 0 : count_up(rules_.words + by_key, static_cast<uint32_t>(count_bits(partial)));
      shared_store(&smem_.number, number);
      global_store(rules_.words + planes.some + index, some);
      global_store(rules_.words + planes.whole + index, whole);
      global_store(rules_.words + planes.first + index, number);
    }
    block_sync();  // the number of the first partial cell is in shared memory
    auto const number = static_cast<int64_t>(shared_load<uint32_t>(&smem_.number));
    auto* const bits = reinterpret_cast<uint64_t*>(rules_.words + planes.bits);
    for (int32_t c = group; c < count; c += groups_of_map) {
      int64_t const at = number + count_bits(partial & ((1u << c) - 1));
      if (!(partial >> c & 1) || at >= rules_.capacity) continue;
      global_store(bits + at * cell_size + row_of_cell, shared_load<uint64_t>(&smem_.seen[c][row_of_cell]));
    }
  }

  /// A warp finds the least and the greatest document of a cell.
  FLASHCUTE_DEVICE void find_range(int32_t const* documents, int32_t cell, int32_t length, int32_t place) const {
    int32_t const lane = thread_index() % 32, first = cell * cell_size;
    int32_t const a = documents[min_of(first + lane, length - 1)], b = documents[min_of(first + lane + 32, length - 1)];
    int32_t const least = warp_least(min_of(a, b)), greatest = warp_greatest(max_of(a, b));
    if (lane != 0) return;
    shared_store(&smem_.least[place], least);
    shared_store(&smem_.greatest[place], greatest);
  }

  /// Which columns of a cell this thread's row sees by the booleans. A warp has 32 rows, and its lanes read neighbours
  /// in memory: where those are rows, each lane reads its own; else they read columns, row after row.
  template <class Rows>
  FLASHCUTE_DEVICE static uint64_t seen_in_booleans(Rows const& rows, int32_t row, int32_t cell) {
    constexpr int32_t at_once = 16;  // reads of a lane before the first of them is used
    int32_t const lane = thread_index() % 32, first_row = row - lane, first = cell * cell_size;
    int32_t const rows_left = rows.rows() - first_row, columns_left = rows.columns() - first;
    auto const [from, down, across] = rows.booleans(first_row);
    uint64_t seen = 0;
    if (down == 1) {
      int32_t const count = lane < rows_left ? columns_left : 0;
      uint8_t const* own = from + lane + first * across;
      CUTE_NO_UNROLL
      for (int32_t c = 0; c < cell_size; c += at_once, own += at_once * across) {
        uint32_t bits = 0;
        CUTE_UNROLL
        for (int32_t i = 0; i < at_once; ++i) {
          bits |= uint32_t{c + i < count && own[i * across] != 0} << i;
        }
        seen |= uint64_t{bits} << c;
      }
    } else {
      uint8_t const* own = from + (first + lane) * across;
      CUTE_NO_UNROLL
      for (int32_t r = 0; r < 32; r += at_once / 2, own += at_once / 2 * down) {
        CUTE_UNROLL
        for (int32_t i = 0; i < at_once / 2; ++i) {
          bool const exists = r + i < rows_left;
          uint32_t const low = lanes_with(exists && lane < columns_left && own[i * down] != 0);
          uint32_t const high = lanes_with(exists && lane + 32 < columns_left && own[i * down + 32 * across] != 0);
          if (r + i == lane) seen = low | uint64_t{high} << 32;
        }
      }
    }
    return seen;
  }

  enum Known : int32_t { unknown, none, all };

  /// What the numbers of documents alone say of a cell.
  template <class Rows>
  FLASHCUTE_DEVICE Known known_of_documents(Rows const& rows, int32_t cell) const {
    auto const documents = [&](int32_t place) {
      return typename Rows::Documents{shared_load<int32_t>(&smem_.least[place]),
                                      shared_load<int32_t>(&smem_.greatest[place])};
    };
    auto const of_rows = documents(cells_of_word), of_columns = documents(cell);
    if (Rows::hide_all(of_rows, of_columns)) return none;
    return rows.show_all(of_rows, of_columns) ? all : unknown;
  }

  BlockMapRules const& rules_;
  SharedStorage& smem_;
};

}  // namespace flashcute

/// Defines the kernel NAME.
#define FLASHCUTE_BLOCK_MAP_ENTRY(NAME)                                                                    \
  extern "C" __global__ void __launch_bounds__(flashcute::threads_of_map, flashcute::blocks_of_map)        \
      NAME(__grid_constant__ flashcute::BlockMapRules const rules) {                                       \
    extern __shared__ __align__(128) unsigned char smem[];                                                 \
    flashcute::MakeBlockMap::run(rules, *reinterpret_cast<flashcute::MakeBlockMap::SharedStorage*>(smem)); \
  }
