// The passes before and after Hopper's gradients: what `gradients` needs of the rows of dO and O, and dQ from its sums.
#pragma once

#include "flashcute/core/constants.hpp"
#include "flashcute/device/delta.hpp"
#include "flashcute/sm90/backward.hpp"

namespace flashcute::sm90 {

/// The pass before: computes delta, converts the LSE to base 2, and prepares the sums of dQ.
template <BackwardKernelId Id>
struct PrepareGradients {
  static_assert(has_only<&Features::mask>(Id.features), FLASHCUTE_UNKNOWN_FEATURE);
  static constexpr BackwardConfig C = Id.config;
  using Element = typename TensorCore<C.dtype>::Element;
  using Tile = QueryTile<typename Mask<Id.features.mask>::Sequence>;
  using Workspace = GradientWorkspace<C>;
  static constexpr int threads = num_threads(Id);

  FLASHCUTE_DEVICE static void run(BackwardParams const& p) {
    PassesInTurn<C>::begin_next();
    auto const tile = Tile::at(p.forward, block_index(), C.block_m);
    int64_t const number = Workspace::number(p.forward, tile.entry.batch, tile.head, tile.row0 / C.block_m);
    DqOrder<Id>::prepare(p, number);
    float *const lse = Workspace::lse(p, number), *const delta = Workspace::delta(p, number);
    for (int row = thread_index(); row < C.block_m; row += threads) {
      if (row >= tile.rows) {  // exp(S - infinity) is 0
        global_store(lse + row, float{infinity});
        global_store(delta + row, 0.f);
        continue;
      }
      // Of infinity NaN: the row sees keys whose scores are all -infinity, or NaN, and its P is NaN, also where Q was
      // replaced by 0 and the scores are finite. (A row that sees no key is hidden from every block.)
      float const x = global_load<float>(static_cast<float const*>(p.forward.lse) + tile.lse_offset(p.forward) + row);
      global_store(lse + row, is_finite(x) ? x * log2_e<float> : infinity - infinity);
    }
    Delta<Element, C.block_m, C.head_dim_v, 16, threads>::compute(
        p, tile, [&](int row, float x) { global_store(delta + row, x); });
  }
};

/// The pass after: turns the sums into dQ. A warpgroup converts what a warpgroup of `gradients` has computed.
template <BackwardKernelId Id>
struct FinishGradients {
  static_assert(has_only<&Features::mask>(Id.features), FLASHCUTE_UNKNOWN_FEATURE);
  static constexpr BackwardConfig C = Id.config;
  using Tile = QueryTile<typename Mask<Id.features.mask>::Sequence>;
  using L = BackwardLayout<C>;
  using Workspace = GradientWorkspace<C>;

  FLASHCUTE_DEVICE static void run(BackwardParams const& p) {
    auto const tile = Tile::at(p.forward, block_index(), C.block_m);
    int64_t const number = Workspace::number(p.forward, tile.entry.batch, tile.head, tile.row0 / C.block_m);
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

template <BackwardKernelId Id>
struct SmallPass : PrepareGradients<Id> {};

template <BackwardKernelId Id>
  requires(Id.pass == BackwardPass::finish)
struct SmallPass<Id> : FinishGradients<Id> {};

}  // namespace flashcute::sm90
