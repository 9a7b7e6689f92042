// Blocks of queries that pass a tile of keys: which they are, and what the loading warp tells of them.
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
