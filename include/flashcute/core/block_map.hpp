// Block maps: any mask of given sizes as data in memory. The grid of queries and keys is cut into cells of 64 x 64. Of
// each cell two bits say whether some query sees some key, and whether all see all; cells of which only the first holds
// are partial and have a bit for every element. All of it is there twice, by query and by key, so that both directions
// of the backward read words along their rows.
#pragma once

#include "flashcute/core/std.hpp"

namespace flashcute {

inline constexpr int32_t cell_size = 64;       // queries, and keys, of a cell
inline constexpr int32_t cells_of_word = 32;   // cells of a row of cells whose bits share a word
inline constexpr int32_t words_of_cell = 128;  // of the elements of a partial cell: 64 rows of 64 bits

FLASHCUTE_HD constexpr int32_t count_cells(int32_t length) { return ceil_div(length, cell_size); }

/// The sizes that a map is made for. `maps`: one, or one for each batch entry, head, or both.
struct BlockMapSizes {
  int64_t maps;
  int32_t seqlen_q, seqlen_k;
};

/// One direction of the maps: rows of cells, by query or by key, and the places of their words.
struct CellPlanes {
  int64_t rows;   // of cells, of one map
  int64_t words;  // of a row, of each plane
  // Offsets in words of 32 bits. The planes are (maps, rows, words). `first` has, of each word, the number of its first
  // partial cell; partial cell i of the maps has its elements at bits + i * words_of_cell.
  int64_t some, whole, first, bits;
};

/// The words of some maps, in this order: how many partial cells there are by query and by key (and two words without
/// meaning), the planes by query, the planes by key, the elements of partial cells by query, and by key. There is room
/// for `capacity` partial cells in each direction.
struct BlockMapLayout {
  static constexpr int64_t header = 4;

  CellPlanes by_query, by_key;
  int64_t size;  // in words

  FLASHCUTE_HD static constexpr BlockMapLayout of(BlockMapSizes const& sizes, int64_t capacity) {
    BlockMapLayout all{};
    int64_t at = header;
    int32_t const queries = count_cells(sizes.seqlen_q), keys = count_cells(sizes.seqlen_k);
    all.by_query = planes(sizes.maps, queries, keys, at);
    all.by_key = planes(sizes.maps, keys, queries, at);
    at = ceil_div<int64_t>(at, 4) * 4;  // elements are read in words of 64 bits
    all.by_query.bits = at;
    all.by_key.bits = at + capacity * words_of_cell;
    all.size = at + 2 * capacity * words_of_cell;
    return all;
  }

 private:
  FLASHCUTE_HD static constexpr CellPlanes planes(int64_t maps, int32_t rows, int32_t columns, int64_t& at) {
    CellPlanes p{};
    p.rows = rows;
    p.words = ceil_div(columns, cells_of_word);
    int64_t const plane = maps * p.rows * p.words;
    p.some = at;
    p.whole = at + plane;
    p.first = at + 2 * plane;
    p.bits = 0;
    at += 3 * plane;
    return p;
  }
};

/// The maps of a launch, for tensors of the sizes that they are made for.
struct BlockMapParams {
  uint32_t const* words = nullptr;  // null: none
  int64_t capacity = 0;
  int32_t batch_stride = 0, head_stride = 0;  // in maps: 0 where one serves all
  CellPlanes by_query = {}, by_key = {};
  // 128 bytes: what follows in the parameters of a launch keeps its alignment, on which the choice of instructions
  // depends.
  uint8_t reserved[8] = {};

  FLASHCUTE_HD static constexpr BlockMapParams of(uint32_t const* words, BlockMapSizes const& sizes, int64_t capacity,
                                                  int32_t batch_stride, int32_t head_stride) {
    BlockMapLayout const layout = BlockMapLayout::of(sizes, capacity);
    return {words, capacity, batch_stride, head_stride, layout.by_query, layout.by_key, {}};
  }

  FLASHCUTE_HD constexpr int64_t number(int32_t batch, int32_t head) const {
    return int64_t{batch} * batch_stride + int64_t{head} * head_stride;
  }
};

}  // namespace flashcute
