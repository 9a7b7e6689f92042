// Writes a warpgroup's output from its registers to global memory.
#pragma once

#include "flashcute/device/apply.hpp"
#include "flashcute/device/nonfinite.hpp"
#include "flashcute/sm90/layout.hpp"

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

/// Rounds the output and writes 16 bytes per lane, without shared memory, so that the next tile's loads need not wait.
/// `tile` holds the warpgroup's rows.
template <ForwardConfig C, class Output, class Tile>
FLASHCUTE_DEVICE void store_output(Output const& output, ForwardParams const& p, Tile const& tile) {
  using namespace cute;
  using L = ForwardLayout<C>;
  using Element = typename L::Element;
  auto const o = by_row_and_column(output);  // (row, column)
  int const lane = thread_index() % 4;
  auto* const to = static_cast<Element*>(p.out) + tile.out_offset(p) + 8 * lane;
  CUTE_UNROLL
  for (int i = 0; i < L::rows_per_thread; ++i) {
    bool const exists = L::row(i) < tile.rows;
    auto* const row = to + L::row(i) * p.out_stride.row;
    CUTE_UNROLL
    for (int block = 0; block < C.head_dim_v; block += 32) {  // columns; a lane has 8 of them in 4 pairs
      uint32_t word[4];
      CUTE_UNROLL
      for (int j = 0; j < 4; ++j) word[j] = round_pair<Element>(o(i, block / 4 + 2 * j), o(i, block / 4 + 2 * j + 1));
      transpose_in_quad(word);
      global_store_if(exists && block + 8 * lane < p.head_dim_v, row + block,
                      uint4{word[0], word[1], word[2], word[3]});
    }
  }
}

/// Adds to the elements of the output that this thread has written the non-finite values that were replaced by 0, where
/// they are visible, among keys [first, end). Slow, but rare.
template <ForwardConfig C, class Mask>
FLASHCUTE_DEVICE void add_dropped(int first, int end, ForwardParams const& p,
                                  QueryTile<typename Mask::Sequence> const& tile) {
  using L = ForwardLayout<C>;
  using Element = typename L::Element;
  auto const* const values = static_cast<Element const*>(p.v) + tile.v_offset(p);
#pragma unroll 1
  for (int i = 0; i < L::rows_per_thread; ++i) {
    int const row = L::row(i);
    if (row >= tile.rows) continue;
    auto* const out = static_cast<Element*>(p.out) + tile.out_offset(p) + row * p.out_stride.row;
#pragma unroll 1
    for (int block = 8 * (thread_index() % 4); block < p.head_dim_v; block += 32) {
#pragma unroll 1
      for (int column = block; column < block + 8; ++column) {
        float sum = 0;
#pragma unroll 1
        for (int key = first; key < end; ++key) {
          auto const x = static_cast<float>(global_load<Element>(values + key * p.v_stride.row + column));
          if (!is_finite(x) && Mask::visible(tile.row0 + row, key, tile.sequence(p))) sum += x;
        }
        if (sum == 0) continue;
        global_store(out + column, static_cast<Element>(static_cast<float>(global_load<Element>(out + column)) + sum));
      }
    }
  }
}

/// A tile that sees no key: output 0; LSE -inf, or the sink in rows that exist. `threads` threads write it.
template <ForwardConfig C, class Mask>
FLASHCUTE_DEVICE void store_empty(ForwardParams const& p, QueryTile<typename Mask::Sequence> const& tile, int thread,
                                  int threads) {
  using Element = typename ForwardLayout<C>::Element;
  int const vectors = p.head_dim_v / 8;  // 16 bytes each
  auto* const out = static_cast<Element*>(p.out) + tile.out_offset(p);
  for (int i = thread; i < tile.rows * vectors; i += threads) {
    global_store(out + i / vectors * p.out_stride.row + i % vectors * 8, uint4{});
  }
  if (p.lse == nullptr) return;
  float* const lse = static_cast<float*>(p.lse) + tile.lse_offset(p);
  float sink = -infinity;
  if constexpr (Mask::two_edges) sink = sink_of<Element>(p, tile.head);
  for (int i = thread; i < tile.rows; i += threads) global_store(lse + i, i < tile.existing(p) ? sink : -infinity);
}

}  // namespace flashcute::sm90
