// Writes the rows of a warpgroup's accumulator from its registers to global memory.
#pragma once

#include "flashcute/sm90/fragment.hpp"

namespace flashcute::sm90 {

/// Transposes a 4 x 4 matrix of words, one row in each lane of a quad.
FLASHCUTE_DEVICE void transpose_in_quad(uint32_t (&word)[4]) {
  int const lane = thread_index() % 4;
  CUTE_UNROLL
  for (int distance = 1; distance <= 2; distance *= 2) {
    bool const upper = lane & distance;
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i & distance) continue;
      // Of each pair of words the lane keeps one and exchanges the other with its partner.
      uint32_t const given = upper ? word[i] : word[i + distance];
      uint32_t const got = shuffle_xor_word(given, distance);
      if (upper) {
        word[i] = got;
      } else {
        word[i + distance] = got;
      }
    }
  }
}

/// Rounds an accumulator of 64 x Columns and writes 16 bytes per lane, without shared memory, so that loads to it need
/// not wait. `to`: the warpgroup's first row; only the first `rows` rows and `columns` columns exist. (Numbers by
/// reference: of copies nvcc 13.0 makes other code in the forward.)
template <int Columns, class Element, class Accumulator>
FLASHCUTE_DEVICE void store_rows(Accumulator const& accumulator, Element* to, int64_t const& row_stride,
                                 int const& rows, int const& columns) {
  using namespace cute;
  auto const x = by_row_and_column(accumulator);  // (row, column)
  auto const lane = static_cast<int>(static_cast<uint32_t>(thread_index()) % 4);
  to += 8 * lane;
  CUTE_UNROLL
  for (int i = 0; i < WarpgroupFragment::rows_per_thread; ++i) {
    bool const exists = WarpgroupFragment::row(i) < rows;
    auto* const row = to + WarpgroupFragment::row(i) * row_stride;
    CUTE_UNROLL
    for (int block = 0; block < Columns; block += 32) {  // columns; a lane has 8 of them in 4 pairs
      uint32_t word[4];
      CUTE_UNROLL
      for (int j = 0; j < 4; ++j) word[j] = round_pair<Element>(x(i, block / 4 + 2 * j), x(i, block / 4 + 2 * j + 1));
      transpose_in_quad(word);
      global_store_if(exists && block + 8 * lane < columns, row + block, uint4{word[0], word[1], word[2], word[3]});
    }
  }
}

/// Writes zeros to the rows of a tile, which begin `offset` elements after `tensor`. `Threads` call it, `thread` is the
/// number of this one.
template <int Threads, class Element, class Tile>
FLASHCUTE_DEVICE void clear_rows(Tile const& tile, void* tensor, int64_t offset, Strides const& stride, int columns,
                                 int thread = thread_index()) {
  auto* const first = static_cast<Element*>(tensor) + offset;
  int const vectors = columns / 8;  // 16 bytes each
  for (int i = thread; i < tile.rows * vectors; i += Threads) {
    global_store(first + i / vectors * stride.row + i % vectors * 8, uint4{});
  }
}

}  // namespace flashcute::sm90
