// Hopper's gradients as kernels: the passes that multiply, and those before and after `gradients`: what it needs of the
// rows of dO and O, dQ from its sums, and the gradient of a sink.
#pragma once

#include "flashcute/device/sink_gradient.hpp"
#include "flashcute/sm90/backward.hpp"
#include "flashcute/sm90/backward_keys.hpp"
#include "flashcute/sm90/backward_queries.hpp"
#include "flashcute/sm90/row_statistics.hpp"

namespace flashcute::sm90 {

/// The pass before: computes delta, converts the LSE to base 2, and prepares the sums of dQ.
template <BackwardKernelId Id>
struct PrepareGradients {
  static_assert(has_only<&Features::mask>(Id.features), FLASHCUTE_UNKNOWN_FEATURE);
  static constexpr BackwardConfig C = Id.config;
  using Element = typename TensorCore<C.dtype>::Element;
  using Sequence = typename Mask<Id.features.mask>::Sequence;
  using Tile = QueryTile<Sequence>;
  using Workspace = GradientWorkspace<C, Sequence>;
  static constexpr int threads = num_threads(Id);

  struct SharedStorage {};

  FLASHCUTE_DEVICE static void run(BackwardParams const& p, SharedStorage& /*smem*/) {
    PassesInTurn<C>::begin_next();
    auto const tile = Tile::at(p.forward, block_index(), C.block_m);
    int64_t const number = Workspace::number(p.forward, tile.entry, tile.head, tile.row0 / C.block_m);
    int const existing = tile.existing(p.forward);
    DqOrder<Id>::prepare(p, number);
    float *const lse = Workspace::lse(p, number), *const delta = Workspace::delta(p, number);
    for (int row = thread_index(); row < C.block_m; row += threads) {
      if (row >= existing) {
        global_store(lse + row, float{missing_lse});
        global_store(delta + row, 0.f);
        continue;
      }
      global_store(lse + row, base_2_lse(p.forward, tile, row));
    }
    Delta<Element, C.block_m, C.head_dim_v, 16, threads>::compute(p, tile, [&](int row, float x) {
      if (Sequence::fills_tensors || row < existing) global_store(delta + row, x);
    });
  }
};

/// The pass after: turns the sums into dQ. A warpgroup converts what a warpgroup of `gradients` has computed.
template <BackwardKernelId Id>
struct FinishGradients {
  static_assert(has_only<&Features::mask>(Id.features), FLASHCUTE_UNKNOWN_FEATURE);
  static constexpr BackwardConfig C = Id.config;
  using Sequence = typename Mask<Id.features.mask>::Sequence;
  using Tile = QueryTile<Sequence>;
  using L = BackwardLayout<C>;
  using Workspace = GradientWorkspace<C, Sequence>;

  struct SharedStorage {};

  FLASHCUTE_DEVICE static void run(BackwardParams const& p, SharedStorage& /*smem*/) {
    auto const tile = Tile::at(p.forward, block_index(), C.block_m);
    int64_t const number = Workspace::number(p.forward, tile.entry, tile.head, tile.row0 / C.block_m);
    int const warpgroup = warpgroup_index();
    float const* const from = Workspace::sums(p, number) + warpgroup * L::dq_floats + 4 * thread_of_warpgroup();
    auto dq = L::template accumulator<typename L::DqColumns>();
    auto const scale = static_cast<float>(p.forward.scale);
    PassesInTurn<C>::await_before();
    bool const has_sums = DqOrder<Id>::has_sums(p, number, warpgroup);
    CUTE_UNROLL
    for (int i = 0; i < cute::size(dq); i += 4) {
      auto word = global_load<float4>(from + i * warpgroup_size);
      if (!has_sums) word = {};
      dq(i) = word.x * scale, dq(i + 1) = word.y * scale, dq(i + 2) = word.z * scale, dq(i + 3) = word.w * scale;
    }
    int const row0 = L::dq_by_rows ? warpgroup * warpgroup_rows : 0;
    int const column0 = L::dq_by_rows ? 0 : warpgroup * L::dq_columns;
    auto const offset =
        row_offset(p.dq_stride, tile.entry.batch, tile.head, tile.entry.first_query + tile.row0 + row0) + column0;
    store_rows<L::dq_columns>(dq, static_cast<typename L::Element*>(p.dq) + offset, p.dq_stride.row, tile.rows - row0,
                              p.forward.head_dim - column0);
  }
};

/// What the pass `sink` reads of a query head: the rows of all its blocks. Of those that do not exist P is 0.
template <BackwardKernelId Id>
struct BlockStatistics {
  static constexpr BackwardConfig C = Id.config;
  using Sequence = typename Mask<Id.features.mask>::Sequence;
  using Workspace = GradientWorkspace<C, Sequence>;

  FLASHCUTE_DEVICE static float const* lse(BackwardParams const& p) { return Workspace::lse(p, 0); }
  FLASHCUTE_DEVICE static float const* delta(BackwardParams const& p) { return Workspace::delta(p, 0); }
  FLASHCUTE_DEVICE static int64_t first(ForwardParams const& f, int batch, int head) {
    return Workspace::first_of_head(f, batch, head) * C.block_m;
  }
  FLASHCUTE_DEVICE static int count(ForwardParams const& f, int /*batch*/, int /*head*/) {
    return static_cast<int>(Workspace::blocks(f)) * C.block_m;
  }
  FLASHCUTE_DEVICE static float probability(float sink, float lse) { return exp2f(sink * log2_e<float> - lse); }

  FLASHCUTE_DEVICE static QueryPlace<Sequence> place(ForwardParams const& f, int batch, int head, int row) {
    auto const tile = QueryTile<Sequence>::of(f, batch * f.heads + head, row / C.block_m, C.block_m);
    return {tile.entry, tile.row0 + row % C.block_m};
  }
};

/// A pass that multiplies.
template <BackwardKernelId Id>
struct GradientPass : KeyGradients<Id> {};

template <BackwardKernelId Id>
  requires(Id.pass == BackwardPass::queries)
struct GradientPass<Id> : QueriesPass<Id> {};

template <BackwardKernelId Id>
  requires(Id.pass == BackwardPass::keys)
struct GradientPass<Id> : KeysPass<Id> {};

template <BackwardKernelId Id>
struct SmallPass : PrepareGradients<Id> {};

template <BackwardKernelId Id>
  requires(Id.pass == BackwardPass::sink)
struct SmallPass<Id> : SinkGradient<Id, BlockStatistics<Id>> {};

template <BackwardKernelId Id>
  requires(Id.pass == BackwardPass::finish)
struct SmallPass<Id> : FinishGradients<Id> {};

}  // namespace flashcute::sm90
