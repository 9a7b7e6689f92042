// FlashAttention-2 forward on tensor cores (cp.async, ldmatrix, mma.sync; compute capability 8.0 and
// later). One thread block computes one tile of query rows of one head.
// Source: Dao, "FlashAttention-2", arXiv 2307.08691, algorithm 1.
#pragma once

#include "flashcute/device/apply.hpp"
#include "flashcute/device/softmax.hpp"
#include "flashcute/policy/block_counter.hpp"
#include "flashcute/sm80/loader.hpp"
#include "flashcute/sm80/store.hpp"

namespace flashcute {

template <ForwardKernelId Id>
struct ForwardPass {
  static constexpr ForwardConfig F = Id.config;
  static constexpr TileConfig C = tile_of(F);
#define FLASHCUTE_RULE(id, sentence) static_assert(check(F, compiled_arch) != ForwardConfigError::id, sentence);
  FLASHCUTE_FORWARD_CONFIG_RULES(FLASHCUTE_RULE)
#undef FLASHCUTE_RULE
  static_assert(has_only<&Features::mask, &Features::count_blocks>(Id.features), FLASHCUTE_UNKNOWN_FEATURE);

  using L = TileLayout<C>;
  static_assert(sizeof(typename L::SharedStorage) == smem_bytes(F));
  using P = Products<C>;
  using Mask = flashcute::Mask<Id.features.mask>;
  using Tile = QueryTile<typename Mask::Sequence>;
  using Softmax =
      OnlineSoftmax<L::rows_per_thread, F.optimized_softmax, F.rescale_threshold, takes_sink(Id.features.mask)>;

  FLASHCUTE_DEVICE static void run(ForwardParams const& p, typename L::SharedStorage& smem) {
    using namespace cute;
    auto const tile = Tile::at(p, block_index(), C.block_m);
    if (!Mask::Sequence::fills_tensors && tile.rows == 0) return;  // a slot that no sequence needs
    auto const range = Mask::kv_range(tile, p, C.block_n);
    ForwardLoader<F, Mask> loader{p, tile, range, smem};
    Softmax softmax{p};
    BlockCounter<Id.features.count_blocks> counter;

    auto q = loader.query();
    auto o = L::template accumulator<typename L::BlockM, typename L::HeadDimV>();  // (MMA, MMA_M, MMA_DV)
    range.for_each_backward([&](int n, auto partial) {
      counter.visit(decltype(partial)::value);
      auto s = L::template accumulator<typename L::BlockM, typename L::BlockN>();  // (MMA, MMA_M, MMA_N)
      P::gemm(s, q, loader.key(n, partial));                                       // S = Q K^T
      auto v = loader.value(n, partial);  // K(n - 1) loads while the softmax and P V compute
      if constexpr (decltype(partial)::value) apply_mask(s, tile, n, p);
      softmax.update(s, o);
      if constexpr (P::wants_finite || (decltype(partial)::value && Mask::rows_differ)) loader.drop_nonfinite_values(n);
      P::gemm(o, P::probabilities(s), v);  // O += P V
    });

    finish_rows<Mask, typename L::Element>(softmax, o, p, tile, [](int i) { return row_of(i); });
    store_lse(softmax, p, tile);
    store_counts(counter, p, tile);
    stage_output<C>(o, smem);
    if constexpr (P::wants_finite || Mask::rows_differ) {
      if (loader.dropped_values()) add_dropped_values(range, p, tile, smem);
    }
    store_output<C>(p, tile, smem);
  }

 private:
  /// (row, column) within the tile of every score that this thread holds, by row and column.
  FLASHCUTE_DEVICE static auto coordinates() {
    return by_row_and_column(L::template coordinates<typename L::BlockM, typename L::BlockN>(thread_index()));
  }

  /// Tile row of the thread's i-th row.
  FLASHCUTE_DEVICE static int row_of(int i) { return cute::get<0>(coordinates()(i, 0)); }

  /// Adds to the staged output the non-finite values that were replaced by 0, where they are visible.
  FLASHCUTE_DEVICE static void add_dropped_values(typename Mask::Range const& range, ForwardParams const& p,
                                                  Tile const& tile, typename L::SharedStorage& smem) {
    auto const& entry = tile.entry;
    auto const v = Rows<typename L::Element>::of(p.v, p.v_stride, entry.batch, tile.kv_head, entry.first_key);
    auto const looked_at = range.keys(!P::wants_finite, C.block_n, tile.sequence(p));
    add_dropped<C, typename L::SmemO>(v, looked_at, tile.rows, p.head_dim_v, smem.q, [&](int row, int key) {
      return Mask::visible(tile.row0 + row, key, tile.sequence(p));
    });
    block_sync();  // all elements are corrected
  }

  template <class Scores>
  FLASHCUTE_DEVICE static void apply_mask(Scores& scores, Tile const& tile, int n, ForwardParams const& p) {
    int const key = n * C.block_n + cute::get<1>(coordinates()(0, 0));
    flashcute::apply_mask<L, Mask>(scores, [&](int i) { return tile.row0 + row_of(i); }, key, tile.sequence(p));
  }

  FLASHCUTE_DEVICE static void store_lse(Softmax const& softmax, ForwardParams const& p, Tile const& tile) {
    if (p.lse == nullptr || thread_index() % 4 != 0) return;  // one lane of the quad that shares a row
    float* const lse = static_cast<float*>(p.lse) + tile.lse_offset(p);
    CUTE_UNROLL
    for (int i = 0; i < L::rows_per_thread; ++i) {
      if (row_of(i) < tile.rows) global_store(lse + row_of(i), softmax.lse(i));
    }
  }

  FLASHCUTE_DEVICE static void store_counts(BlockCounter<Id.features.count_blocks> const& counter,
                                            ForwardParams const& p, Tile const& tile) {
    if constexpr (Id.features.count_blocks) {
      if (thread_index() != 0) return;
      global_store(p.block_counts + tile.block_counts_offset(p, C.block_m),
                   counter.counts(tile.sequence(p), C.block_n));
    }
  }
};

}  // namespace flashcute
