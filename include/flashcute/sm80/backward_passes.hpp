// The passes of the backward as kernels: those that compute gradients, those before and after `gradients`, and the one
// for a sink.
#pragma once

#include "flashcute/device/sink_gradient.hpp"
#include "flashcute/sm80/backward.hpp"

namespace flashcute {

/// The pass before `gradients`: computes delta and clears the sums for dQ.
template <BackwardKernelId Id>
struct PrepareGradients {
  static_assert(has_only<&Features::mask>(Id.features), FLASHCUTE_UNKNOWN_FEATURE);
  static constexpr TileConfig C = tile_of(Id.config, Id.pass);
  using Tile = QueryTile<typename Mask<Id.features.mask>::Sequence>;

  struct SharedStorage {};

  FLASHCUTE_DEVICE static void run(BackwardParams const& p, SharedStorage& /*smem*/) {
    auto const tile = Tile::at(p.forward, block_index(), C.block_n);
    QueryGradientSums<Id.config>::of(p, tile).clear();
    int const existing = tile.existing(p.forward);
    using Element = typename TileLayout<C>::Element;
    constexpr int threads = TileLayout<C>::threads;
    Delta<Element, C.block_n, C.head_dim_v, C.copy_bytes, threads>::compute(p, tile, [&](int row, float delta) {
      if (!Tile::Sequence::fills_tensors && row >= existing) delta = 0;  // for the pass `sink`
      global_store(static_cast<float*>(p.delta) + tile.lse_offset(p.forward) + row, delta);
    });
  }
};

/// The pass after `gradients`: turns the sums into dQ.
template <BackwardKernelId Id>
struct FinishGradients {
  static_assert(has_only<&Features::mask>(Id.features), FLASHCUTE_UNKNOWN_FEATURE);
  static constexpr TileConfig C = tile_of(Id.config, Id.pass);
  using Tile = QueryTile<typename Mask<Id.features.mask>::Sequence>;
  using L = TileLayout<C>;
  using Sums = QueryGradientSums<Id.config>;

  struct SharedStorage {
    alignas(128) typename L::Element dq[C.block_n * C.head_dim];
  };
  static_assert(sizeof(SharedStorage) == smem_bytes(Id));

  FLASHCUTE_DEVICE static void run(BackwardParams const& p, SharedStorage& smem) {
    auto const tile = Tile::at(p.forward, block_index(), C.block_n);
    auto dq = Sums::fragment();  // (MMA, MMA_M, MMA_D)
    Sums::of(p, tile).load(dq);
    auto const scale = static_cast<float>(p.forward.scale);
    CUTE_UNROLL
    for (int i = 0; i < cute::size(dq); ++i) dq(i) *= scale;
    stage_tile<C, typename L::SmemK, Sums::warps_n>(dq, smem.dq);
    block_sync();  // the tile is in shared memory
    using Copy = TileCopy<C, typename L::SmemK>;
    auto const& entry = tile.entry;
    int64_t const first = row_offset(p.dq_stride, entry.batch, tile.head, entry.first_query + tile.row0);
    auto* const to = Copy::first(static_cast<typename L::Element*>(p.dq) + first, p.dq_stride.row);
    Copy::store(smem.dq, to, p.dq_stride.row, tile.rows, p.forward.head_dim);
  }
};

/// What the pass `sink` reads of a query head's rows: LSE and delta as `prepare` leaves them, row by row.
template <BackwardKernelId Id>
struct RowStatistics {
  using Sequence = typename Mask<Id.features.mask>::Sequence;

  FLASHCUTE_DEVICE static float const* lse(BackwardParams const& p) { return static_cast<float const*>(p.forward.lse); }
  FLASHCUTE_DEVICE static float const* delta(BackwardParams const& p) { return static_cast<float const*>(p.delta); }
  /// Where those of a head begin, and how many there are.
  FLASHCUTE_DEVICE static int64_t first(ForwardParams const& f, int batch, int head) {
    return lse_offset(f, batch, head);
  }
  FLASHCUTE_DEVICE static int count(ForwardParams const& f, int batch, int head) {
    return f.sequences.packed() ? f.seqlen_q : Sequence(f, Sequence::Entry::of(f, batch), head).rows();
  }
  /// Of the sink beside a row.
  FLASHCUTE_DEVICE static float probability(float sink, float lse) { return expf(sink - lse); }

  FLASHCUTE_DEVICE static QueryPlace<Sequence> place(ForwardParams const& f, int batch, int /*head*/, int row) {
    auto const entry = Sequence::Entry::of_row(f, batch, row);
    return {entry, row - entry.first_query};
  }
};

template <BackwardKernelId Id>
struct BackwardKernel : TileGradients<Id> {};

template <BackwardKernelId Id>
  requires(Id.pass == BackwardPass::sink)
struct BackwardKernel<Id> : SinkGradient<Id, RowStatistics<Id>> {};

template <BackwardKernelId Id>
  requires(Id.pass == BackwardPass::prepare)
struct BackwardKernel<Id> : PrepareGradients<Id> {};

template <BackwardKernelId Id>
  requires(Id.pass == BackwardPass::finish)
struct BackwardKernel<Id> : FinishGradients<Id> {};

}  // namespace flashcute
