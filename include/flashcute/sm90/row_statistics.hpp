// What Hopper's gradients need of the softmax of query rows: the LSE in units of log 2, and delta.
#pragma once

#include "flashcute/core/constants.hpp"
#include "flashcute/device/delta.hpp"
#include "flashcute/device/nonfinite.hpp"
#include "flashcute/sm90/backward_workspace.hpp"
#include "flashcute/sm90/passing_queries.hpp"

namespace flashcute::sm90 {

/// The LSE of a row of the tile that exists, to base 2. Of infinity NaN: the row sees keys whose scores are all
/// -infinity, or NaN, and its P is NaN, also where Q was replaced by 0 and the scores are finite. (A row that sees no
/// key is hidden from every block.)
template <class Tile>
FLASHCUTE_DEVICE float base_2_lse(ForwardParams const& p, Tile const& tile, int row) {
  float const x = global_load<float>(static_cast<float const*>(p.lse) + tile.lse_offset(p) + row);
  return is_finite(x) ? x * log2_e<float> : infinity - infinity;
}

/// Of a row that does not exist: exp(S - infinity) is 0.
inline constexpr float missing_lse = infinity;

/// Computes both for a tile of `block_m` queries, and writes them to the workspace and to shared memory.
template <BackwardKernelId Id>
struct RowStatistics {
  static constexpr BackwardConfig C = Id.config;
  using Element = typename TensorCore<C.dtype>::Element;
  using Workspace = GradientWorkspace<C, typename Mask<Id.features.mask>::Sequence>;
  static constexpr int threads = 32 * C.num_warps;  // that call it
  static_assert(threads >= C.block_m);

  template <class Tile>
  FLASHCUTE_DEVICE static void compute(BackwardParams const& p, Tile const& tile, float* lse, float* delta,
                                       int thread) {
    int64_t const number = Workspace::number(p.forward, tile.entry, tile.head, tile.row0 / C.block_m);
    float *const all_lse = Workspace::lse(p, number), *const all_delta = Workspace::delta(p, number);
    auto const store_delta = [&](int row, float x) {
      shared_store(delta + row, x);
      global_store(all_delta + row, x);
    };
    if (thread < C.block_m) {
      float const x = thread < tile.rows ? base_2_lse(p.forward, tile, thread) : missing_lse;
      shared_store(lse + thread, x);
      global_store(all_lse + thread, x);
      if (thread >= tile.rows) store_delta(thread, 0.f);
    }
    Delta<Element, C.block_m, C.head_dim_v, 16, threads>::compute_at_once(p, tile, store_delta, thread);
  }
};

}  // namespace flashcute::sm90
