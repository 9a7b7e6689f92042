// The passes of the backward as kernels: those that compute gradients, those before and after `gradients`, and the one
// for a sink.
#pragma once

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

/// The gradient of a query head's sink: -sum(exp(sink - LSE) delta) over all its queries. One thread block computes it,
/// so that the terms are added in the same order in every run.
template <BackwardKernelId Id>
struct SinkGradient {
  static_assert(has_only<&Features::mask>(Id.features), FLASHCUTE_UNKNOWN_FEATURE);
  using Mask = flashcute::Mask<Id.features.mask>;
  using Sequence = typename Mask::Sequence;
  using Element = typename TileLayout<tile_of(Id.config, Id.pass)>::Element;

  static constexpr int threads = num_threads(Id);
  static constexpr int rows_at_once = 4;  // of a thread: their loads are in flight together

  struct SharedStorage {
    float sum[Id.config.num_warps];
  };
  static_assert(sizeof(SharedStorage) == smem_bytes(Id));

  FLASHCUTE_DEVICE static void run(BackwardParams const& p, SharedStorage& smem) {
    ForwardParams const& f = p.forward;
    auto const head = static_cast<int>(block_index());
    float const sink = sink_of<Element>(f, head);
    float sum = 0;
    for (int batch = 0; batch < f.batch; ++batch) {
      auto const first = lse_offset(f, batch, head);
      int const rows = f.sequences.packed() ? f.seqlen_q : Sequence(f, Sequence::Entry::of(f, batch), head).rows();
      for (int row0 = thread_index(); row0 < rows; row0 += rows_at_once * threads) {
        float lse[rows_at_once], delta[rows_at_once];
        CUTE_UNROLL
        for (int i = 0; i < rows_at_once; ++i) {
          auto const row = first + min_of(row0 + i * threads, rows - 1);  // a branch would wait for the loads before
          lse[i] = global_load<float>(static_cast<float const*>(f.lse) + row);
          delta[i] = global_load<float>(static_cast<float const*>(p.delta) + row);
        }
        uint32_t not_numbers = 0;
        CUTE_UNROLL
        for (int i = 0; i < rows_at_once; ++i) {
          // Below every number: the row does not exist, all scores that it sees are so, or the sink is none.
          if (row0 + i * threads >= rows || lse[i] == -infinity || sink == -infinity) continue;
          float const term = expf(sink - lse[i]) * delta[i];
          if (term == term) {
            sum -= term;
          } else {
            not_numbers |= 1u << i;
          }
        }
        CUTE_NO_UNROLL
        for (int row = row0; not_numbers != 0; not_numbers >>= 1, row += threads) {
          if (not_numbers & 1) sum -= corrected(sink, p, batch, head, row);
        }
      }
    }
    CUTE_UNROLL
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
    int const warp = thread_index() / 32;
    if (thread_index() % 32 == 0) shared_store(&smem.sum[warp], sum);
    block_sync();  // the sums of all warps are in shared memory
    if (thread_index() != 0) return;
    float total = 0;
    for (int i = 0; i < Id.config.num_warps; ++i) total += shared_load<float>(&smem.sum[i]);
    if (f.sink.float32) {
      global_store(static_cast<float*>(p.dsink) + head, total);
    } else {
      global_store(static_cast<Element*>(p.dsink) + head, static_cast<Element>(total));
    }
  }

 private:
  /// The term of a row, computed as NaN. Where a row does not exist, memory may hold anything; where it sees no key,
  /// delta is -dLSE, whatever dO is.
  FLASHCUTE_DEVICE static float corrected(float sink, BackwardParams const& p, int batch, int head, int row) {
    auto const entry = Sequence::Entry::of_row(p.forward, batch, row);
    Sequence const sequence(p.forward, entry, head);
    int const query = row - entry.first_query;
    if (query >= sequence.rows()) return 0.f;
    auto const offset = lse_offset(p.forward, batch, head) + row;
    float delta = 0;
    if (!Mask::empty_row(query, sequence)) {
      delta = global_load<float>(static_cast<float const*>(p.delta) + offset);
    } else if (p.dlse != nullptr) {
      delta = -global_load<float>(static_cast<float const*>(p.dlse) + row_offset(p.dlse_stride, batch, head, row));
    }
    // NaN where the sink makes it so
    return expf(sink - global_load<float>(static_cast<float const*>(p.forward.lse) + offset)) * delta;
  }
};

template <BackwardKernelId Id>
struct BackwardKernel : TileGradients<Id> {};

template <BackwardKernelId Id>
  requires(Id.pass == BackwardPass::sink)
struct BackwardKernel<Id> : SinkGradient<Id> {};

template <BackwardKernelId Id>
  requires(Id.pass == BackwardPass::prepare)
struct BackwardKernel<Id> : PrepareGradients<Id> {};

template <BackwardKernelId Id>
  requires(Id.pass == BackwardPass::finish)
struct BackwardKernel<Id> : FinishGradients<Id> {};

}  // namespace flashcute
