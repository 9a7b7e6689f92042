// Stores fragments to shared memory, and from there to global memory; restores NaN and infinity that were replaced by
// 0.
#pragma once

#include "flashcute/device/rows.hpp"
#include "flashcute/policy/mask.hpp"
#include "flashcute/sm80/copy.hpp"

namespace flashcute {

/// Stores a fragment of elements (MMA = (2, 2), MMA_M, MMA_N), whose columns WarpsN warps share, to a tile in shared
/// memory: each thread two neighbouring columns at a time.
template <TileConfig C, class Smem, int WarpsN = 1, class Fragment>
FLASHCUTE_DEVICE void stage_fragment(Fragment const& fragment, typename Smem::Element* tile) {
  using namespace cute;
  using L = TileLayout<C>;
  auto const first = L::template first_coordinate<WarpsN>(thread_index());
  Places<Smem> const places{tile, get<0>(first), get<1>(first)};
  auto const pairs = recast<uint_bit_t<16 * sizeof(typename Smem::Element)> const>(fragment);  // ((1, 2), MMA_M, MMA_N)
  CUTE_UNROLL
  for (int n = 0; n < size<2>(pairs); ++n) {
    CUTE_UNROLL
    for (int m = 0; m < size<1>(pairs); ++m) {
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) {
        int const down = L::template row_distance<WarpsN>(2 * m + i);
        shared_store(places.at(down, L::template column_distance<WarpsN>(2 * n)), pairs(i, m, n));
      }
    }
  }
}

/// Rounds a fragment of sums and stores it likewise.
template <TileConfig C, class Smem, int WarpsN = 1, class Fragment>
FLASHCUTE_DEVICE void stage_tile(Fragment const& sums, typename Smem::Element* tile) {
  stage_fragment<C, Smem, WarpsN>(convert<typename Smem::Element>(sums), tile);
}

/// Sets the rows of a staged tile from `first` on to 0.
template <TileConfig C, class Smem>
FLASHCUTE_DEVICE void clear_rows(typename Smem::Element* tile, int first, int rows, int columns) {
  auto staged = cute::make_tensor(cute::make_smem_ptr(tile), typename Smem::Layout{});
  for (int i = first * columns + thread_index(); i < rows * columns; i += TileLayout<C>::threads) {
    shared_store(&staged(i / columns, i % columns), typename Smem::Element{0});
  }
}

/// Adds to each element of a staged tile the non-finite values that its row sees among the rows `others` of a tensor,
/// and that were replaced by 0 before the product. Slow, but rare.
template <TileConfig C, class Smem, class Sees>
FLASHCUTE_DEVICE void add_dropped(Rows<typename Smem::Element> const& from, RowRange const& others, int rows,
                                  int columns, typename Smem::Element* tile, Sees const& sees) {
  using Element = typename Smem::Element;
  auto staged = cute::make_tensor(cute::make_smem_ptr(tile), typename Smem::Layout{});
  for (int i = thread_index(); i < rows * columns; i += TileLayout<C>::threads) {
    int const row = i / columns, column = i % columns;
    float sum = 0;
    for (int other = others.begin; other < others.end; ++other) {
      if (!sees(row, other)) continue;
      auto const x = static_cast<float>(from.at(other, column));
      if (!is_finite(x)) sum += x;
    }
    if (sum == 0) continue;
    auto const x = static_cast<float>(shared_load<Element>(&staged(row, column)));
    shared_store(&staged(row, column), static_cast<Element>(x + sum));
  }
}

/// Writes the output to shared memory, over Q.
template <TileConfig C, class Fragment>
FLASHCUTE_DEVICE void stage_output(Fragment const& o, typename TileLayout<C>::SharedStorage& smem) {
  // Wait until all copies have arrived and all warps have finished reading Q.
  copies_wait();
  block_sync();
  stage_tile<C, typename TileLayout<C>::SmemO>(o, smem.q);
  block_sync();  // the whole tile is in shared memory
}

/// Writes the output from shared to global memory, copy_bytes per thread at a time.
template <TileConfig C, class Tile>
FLASHCUTE_DEVICE void store_output(ForwardParams const& p, Tile const& tile,
                                   typename TileLayout<C>::SharedStorage& smem) {
  using L = TileLayout<C>;
  using Copy = TileCopy<C, typename L::SmemO>;
  auto* const out = Copy::first(static_cast<typename L::Element*>(p.out) + tile.out_offset(p), p.out_stride.row);
  Copy::store(smem.q, out, p.out_stride.row, tile.rows, p.head_dim_v);
}

}  // namespace flashcute
