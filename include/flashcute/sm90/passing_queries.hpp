// Blocks of queries that pass a tile of keys: which they are, what the loading warp tells of them, and where their LSE
// and delta lie in the workspace.
#pragma once

#include "flashcute/core/backward_config.hpp"
#include "flashcute/core/backward_params.hpp"
#include "flashcute/policy/mask.hpp"
#include "flashcute/sm90/fragment.hpp"
#include "flashcute/sm90/ring.hpp"

namespace flashcute::sm90 {

/// Registers per thread of the warpgroup that serves, and of those that compute.
inline constexpr int serving_registers = 40, computing_registers = 232;

/// What the loading warp announces of the block in a place of Q's ring.
struct AnnouncedQueries {
  int row0;      // its first query
  int head;      // of the batch entry
  bool partial;  // elements have to be tested
  bool last;     // of the tile
};

/// Statistics and sums in the workspace, in blocks of `Queries` queries: every head has whole tiles of `block_m`.
template <BackwardConfig C, int Queries = C.block_m>
struct GradientWorkspace {
  static constexpr int sums_of_block = Queries * C.head_dim;

  FLASHCUTE_HD static int64_t blocks(ForwardParams const& p) {
    return ceil_div(p.seqlen_q, C.block_m) * (C.block_m / Queries);
  }
  /// The number of a block among those of all heads.
  FLASHCUTE_HD static int64_t number(ForwardParams const& p, int batch, int head, int block) {
    return (static_cast<int64_t>(batch) * p.heads + head) * blocks(p) + block;
  }

  /// Of block `number`: the base-2 LSE and delta of its queries, and the sums of dQ / scale.
  FLASHCUTE_HD static float* lse(BackwardParams const& p, int64_t number) {
    return static_cast<float*>(p.delta) + number * Queries;
  }
  FLASHCUTE_HD static float* delta(BackwardParams const& p, int64_t number) {
    ForwardParams const& f = p.forward;
    return lse(p, static_cast<int64_t>(f.batch) * f.heads * blocks(f) + number);
  }
  FLASHCUTE_HD static float* sums(BackwardParams const& p, int64_t number) {
    return static_cast<float*>(p.dq_sums) + number * sums_of_block;
  }
};

/// The blocks of `Queries` queries that pass a tile of keys.
template <BackwardKernelId Id, int Queries = Id.config.block_m>
struct PassingQueries {
  static constexpr BackwardConfig C = Id.config;
  using Mask = flashcute::Mask<Id.features.mask>;
  using Tile = KeyTile<typename Mask::Sequence>;

  FLASHCUTE_DEVICE static PassingBlocks of(BackwardParams const& p, Tile const& tile) {
    ForwardParams const& f = p.forward;
    int const group = f.heads / f.kv_heads;
    auto const range = Mask::query_range(tile, f, Queries);
    return PassingBlocks::of(range, tile.sequence(f).rows() / Queries, tile.kv_head * group, group);
  }

  /// Whether elements of the block have to be tested: also where keys are missing.
  FLASHCUTE_DEVICE static bool partial(PassingBlocks const& at, Tile const& tile) {
    return at.partial() || tile.rows < C.block_n;
  }
  /// Whether some of its rows see other keys of the tile than others do, so that its values are inspected.
  FLASHCUTE_DEVICE static bool inspected(PassingBlocks const& at) { return Mask::rows_differ && at.before_full(); }
};

}  // namespace flashcute::sm90
