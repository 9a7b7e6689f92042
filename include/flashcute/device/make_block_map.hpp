// The kernel that makes block maps of rules. A thread block makes 64 rows of 32 cells, in one direction: a word of each
// plane, and the elements of the partial cells among them. Both directions are made alike, each from the rules.
#pragma once

#include "flashcute/core/block_map_kernel.hpp"
#include "flashcute/device/boolean_cells.hpp"
#include "flashcute/device/instructions.hpp"
#include "flashcute/policy/block_map_rules.hpp"

namespace flashcute {

class MakeBlockMap {
 public:
  struct SharedStorage {
    uint64_t seen[cells_of_word][cell_size];                // of each cell, which columns each row sees
    int32_t documents[cells_of_word][cell_size];            // of the cells' columns
    int32_t least[cells_of_word], greatest[cells_of_word];  // of these, of each cell
    // Of the cells that a warp looked at: of which one of its rows sees a column, and of which one does not see all.
    uint32_t some[warps_of_map], broken[warps_of_map];
    uint32_t number;
  };
  static_assert(sizeof(SharedStorage) == smem_bytes(BlockMapKernelId{}));

  FLASHCUTE_DEVICE static void run(BlockMapRules const& rules, SharedStorage& smem) {
    BlockMapLayout const layout = BlockMapLayout::of(rules.sizes, rules.capacity);
    auto const place = MapBlockOrder::of(rules.sizes).place(block_index());
    MakeBlockMap const maker(rules, smem);
    if (place.by_key) {
      maker.make<true>(layout.by_key, place);
    } else {
      maker.make<false>(layout.by_query, place);
    }
  }

 private:
  FLASHCUTE_DEVICE MakeBlockMap(BlockMapRules const& rules, SharedStorage& smem) : rules_(rules), smem_(smem) {}

  /// A word of the planes of a direction.
  template <bool by_key>
  FLASHCUTE_DEVICE void make(CellPlanes const& planes, MapBlockOrder::Place const& place) const {
    using Rows = MapRows<by_key>;
    int32_t const row_of_cells = place.row, word = place.word;
    if (row_of_cells >= planes.rows) return;
    int64_t const index = (place.map * planes.rows + row_of_cells) * planes.words + word;
    Rows const rows(rules_, place.map);
    int32_t const thread = thread_index(), row_of_cell = thread % cell_size, group = thread / cell_size;
    int32_t const first_row = row_of_cells * cell_size, row = first_row + row_of_cell;
    int32_t const first = word * cells_of_word, count = min_of(cells_of_word, count_cells(rows.columns()) - first);

    Known known{low_bits(count), 0};
    if (rows.has_documents()) known = known_of_documents(rows, row_of_cells, first, count);
    if ((known.unknown | known.all) == 0) {
      if (thread == 0) store_planes(planes, index, 0, 0, 0);
      return;
    }
    if (rows.has_booleans()) read_booleans(rows, first_row, first, known.unknown);

    bool const exists = row < rows.rows();
    int32_t const document = rows.has_documents() && exists ? rows.documents_of_rows()[row] : 0;
    uint32_t some = 0, broken = 0;
    for (int32_t c = group; c < count; c += groups_of_map) {
      if (!(known.unknown >> c & 1)) continue;
      uint64_t seen = 0;
      if (exists) {
        seen = rows.existing(first + c) & rows.of_maps(row, first + c);
        if (rows.has_documents()) seen &= columns_of_document(document, c);
        if (rows.has_booleans()) seen &= shared_load<uint64_t>(&smem_.seen[c][row_of_cell]);
      }
      shared_store(&smem_.seen[c][row_of_cell], seen);
      if (warp_any(seen != 0)) some |= 1u << c;
      if (warp_any(exists && seen != rows.existing(first + c))) broken |= 1u << c;
    }
    if (thread % 32 == 0) {
      shared_store(&smem_.some[thread / 32], some);
      shared_store(&smem_.broken[thread / 32], broken);
    }
    block_sync();  // what the rows of all warps see is in shared memory
    some = known.all;
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
      store_planes(planes, index, some, whole, number);
    }
    if (partial == 0) return;
    block_sync();  // the number of the first partial cell is in shared memory
    auto const number = static_cast<int64_t>(shared_load<uint32_t>(&smem_.number));
    auto* const bits = reinterpret_cast<uint64_t*>(rules_.words + planes.bits);
    for (int32_t c = group; c < count; c += groups_of_map) {
      int64_t const at = number + count_bits(partial & ((1u << c) - 1));
      if (!(partial >> c & 1) || at >= rules_.capacity) continue;
      global_store(bits + at * cell_size + row_of_cell, shared_load<uint64_t>(&smem_.seen[c][row_of_cell]));
    }
  }

  FLASHCUTE_DEVICE void store_planes(CellPlanes const& planes, int64_t index, uint32_t some, uint32_t whole,
                                     uint32_t number) const {
    global_store(rules_.words + planes.some + index, some);
    global_store(rules_.words + planes.whole + index, whole);
    global_store(rules_.words + planes.first + index, number);
  }

  /// Of a word of cells: those of which all is visible, and those of which nothing is known; the others are hidden.
  struct Known {
    uint32_t unknown, all;
  };

  /// What the numbers of documents alone say.
  template <class Rows>
  FLASHCUTE_DEVICE Known known_of_documents(Rows const& rows, int32_t row_of_cells, int32_t first,
                                            int32_t count) const {
    using Documents = typename Rows::Documents;
    int32_t const warp = thread_index() / 32, lane = thread_index() % 32;
    auto const of_rows = range_of_warp<Documents>(of_lane(rows.documents_of_rows(), row_of_cells, rows.rows()));
    constexpr int32_t cells_of_warp = cells_of_word / warps_of_map;
    OfLane own[cells_of_warp];  // all are requested before the first is used
    CUTE_UNROLL
    for (int32_t i = 0; i < cells_of_warp; ++i) {
      own[i] = of_lane(rows.documents_of_columns(), first + i * warps_of_map + warp, rows.columns());
    }
    CUTE_UNROLL
    for (int32_t i = 0; i < cells_of_warp; ++i) {
      int32_t const c = i * warps_of_map + warp;
      shared_store(&smem_.documents[c][lane], own[i].first);
      shared_store(&smem_.documents[c][lane + 32], own[i].second);
      auto const found = range_of_warp<Documents>(own[i]);
      if (lane != 0) continue;
      shared_store(&smem_.least[c], found.least);
      shared_store(&smem_.greatest[c], found.greatest);
    }
    block_sync();  // the numbers of all cells are in shared memory
    Documents const of_columns{shared_load<int32_t>(&smem_.least[lane]), shared_load<int32_t>(&smem_.greatest[lane])};
    bool const hidden = lane >= count || Rows::hide_all(of_rows, of_columns);
    uint32_t const all = lanes_with(!hidden && rows.show_all(of_rows, of_columns));
    return {~all & lanes_with(!hidden), all};
  }

  /// Which columns of cell `c` a row of the document sees.
  FLASHCUTE_DEVICE uint64_t columns_of_document(int32_t document, int32_t c) const {
    struct alignas(16) Four {
      int32_t documents[4];
    };
    uint32_t half[2] = {0, 0};
    CUTE_UNROLL
    for (int32_t i = 0; i < cell_size / 4; ++i) {
      auto const four = shared_load<Four>(&smem_.documents[c][4 * i]);
      CUTE_UNROLL
      for (int32_t j = 0; j < 4; ++j) half[i / 8] |= uint32_t{four.documents[j] == document} << (i % 8 * 4 + j);
    }
    return document < 0 ? 0 : half[0] | uint64_t{half[1]} << 32;
  }

  /// The documents of a line of a cell, the lane's, and of the 32nd after it. (Of one that does not exist, another's.)
  struct OfLane {
    int32_t first, second;
  };
  FLASHCUTE_DEVICE static OfLane of_lane(int32_t const* documents, int32_t cell, int32_t length) {
    int32_t const line = cell * cell_size + thread_index() % 32;
    return {documents[min_of(line, length - 1)], documents[min_of(line + 32, length - 1)]};
  }

  /// The least and the greatest document of a cell.
  template <class Documents>
  FLASHCUTE_DEVICE static Documents range_of_warp(OfLane const& own) {
    return {warp_least(min_of(own.first, own.second)), warp_greatest(max_of(own.first, own.second))};
  }

  /// The booleans of the cells, by row, to shared memory.
  template <class Rows>
  FLASHCUTE_DEVICE void read_booleans(Rows const& rows, int32_t first_row, int32_t first, uint32_t cells) const {
    auto const booleans = rows.booleans(first_row);
    BooleanCells const read(booleans.from + int64_t{first} * cell_size * booleans.across, booleans.down,
                            booleans.across, rows.rows() - first_row, rows.columns() - first * cell_size);
    int32_t const warp = thread_index() / 32;
    CUTE_NO_UNROLL
    for (int32_t c = warp; c < cells_of_word; c += warps_of_map) {
      if (cells >> c & 1) read.read(c, smem_.seen[c]);
    }
    block_sync();  // the lines are in shared memory
    if (!read.by_columns()) return;
    CUTE_NO_UNROLL
    for (int32_t c = warp; c < cells_of_word; c += warps_of_map) {
      if (cells >> c & 1) BooleanCells::turn(smem_.seen[c]);
    }
    block_sync();  // the rows are
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
