// Writes a warpgroup's output from its registers to global memory.
#pragma once

#include "flashcute/device/apply.hpp"
#include "flashcute/device/nonfinite.hpp"
#include "flashcute/sm90/layout.hpp"
#include "flashcute/sm90/store_rows.hpp"

namespace flashcute::sm90 {

/// Rounds the output and writes it; `tile` holds the warpgroup's rows.
template <ForwardConfig C, class Output, class Tile>
FLASHCUTE_DEVICE void store_output(Output const& output, ForwardParams const& p, Tile const& tile) {
  using Element = typename ForwardLayout<C>::Element;
  store_rows<C.head_dim_v>(output, static_cast<Element*>(p.out) + tile.out_offset(p), p.out_stride.row, tile.rows,
                           p.head_dim_v);
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
