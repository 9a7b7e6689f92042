// Rows of dK and dV: a warpgroup writes those of its 64 keys, and adds the values of Q or dO that were left out.
#pragma once

#include "flashcute/device/nonfinite.hpp"
#include "flashcute/sm90/passing_queries.hpp"
#include "flashcute/sm90/store_rows.hpp"
// After the instructions that the headers above include.
#include "flashcute/device/fragment.hpp"

namespace flashcute::sm90 {

/// Rounds and writes the warpgroup's rows of `gradient`.
template <int Columns, class Element, class Sums, class Tile>
FLASHCUTE_DEVICE void store_key_rows(Sums const& sums, Tile const& tile, int const& warpgroup, void* gradient,
                                     Strides const& stride, int columns) {
  int const first = warpgroup * warpgroup_rows;
  auto const offset = row_offset(stride, tile.entry.batch, tile.kv_head, tile.entry.first_key + tile.row0 + first);
  store_rows<Columns>(sums, static_cast<Element*>(gradient) + offset, stride.row, tile.rows - first, columns);
}

/// Gradients of keys that do not exist are 0.
template <class L, class Sums, class Tile>
FLASHCUTE_DEVICE void clear_absent(Sums& sums, ForwardParams const& f, Tile const& tile, int const& warpgroup) {
  auto x = by_row_and_column(sums);  // (key, column)
  int const existing = tile.existing(f) - warpgroup * warpgroup_rows;
  CUTE_UNROLL
  for (int i = 0; i < L::rows_per_thread; ++i) {
    bool const exists = L::row(i) < existing;
    CUTE_UNROLL
    for (int j = 0; j < cute::size<1>(x); ++j) x(i, j) = exists ? x(i, j) : 0.f;
  }
}

/// Gradients of keys that no query sees are 0: by `Threads` threads, of which this is number `thread`.
template <int Threads, class Element, class Tile>
FLASHCUTE_DEVICE void clear_key_rows(Tile const& tile, void* gradient, Strides const& stride, int columns, int thread) {
  auto const offset = row_offset(stride, tile.entry.batch, tile.kv_head, tile.entry.first_key + tile.row0);
  clear_rows<Threads, Element>(tile, gradient, offset, stride, columns, thread);
}

/// Adds to the elements of `gradient` that this thread has stored the non-finite values of Q or dO that were replaced
/// by 0, where their queries see the key. Slow, but rare.
template <class L, class Mask, class Tile>
FLASHCUTE_DEVICE void add_dropped(ForwardParams const& f, Tile const& tile, int const& warpgroup, void* gradient,
                                  Strides const& stride, void const* queries, Strides const& from, int columns) {
  using Element = typename L::Element;
  int const group = f.heads / f.kv_heads, batch = tile.entry.batch;
  RowRange const rows = Mask::query_range(tile, f, L::queries).rows(true, L::queries, tile.sequence(f));
  auto const* const all = static_cast<Element const*>(queries);
#pragma unroll 1
  for (int i = 0; i < L::rows_per_thread; ++i) {
    int const key = warpgroup * warpgroup_rows + L::row(i);
    if (key >= tile.rows) continue;
    auto* const to = static_cast<Element*>(gradient) +
                     row_offset(stride, batch, tile.kv_head, tile.entry.first_key + tile.row0 + key);
#pragma unroll 1
    for (int block = 8 * (thread_index() % 4); block < columns; block += 32) {
#pragma unroll 1
      for (int column = block; column < block + 8; ++column) {
        float sum = 0;
#pragma unroll 1
        for (int head = tile.kv_head * group; head < (tile.kv_head + 1) * group; ++head) {
#pragma unroll 1
          for (int query = rows.begin; query < rows.end; ++query) {
            auto const x = static_cast<float>(
                global_load<Element>(all + row_offset(from, batch, head, tile.entry.first_query + query) + column));
            if (!is_finite(x) && Mask::visible(query, tile.row0 + key, tile.sequence(f, head))) sum += x;
          }
        }
        if (sum == 0) continue;
        global_store(to + column, static_cast<Element>(static_cast<float>(global_load<Element>(to + column)) + sum));
      }
    }
  }
}

}  // namespace flashcute::sm90
