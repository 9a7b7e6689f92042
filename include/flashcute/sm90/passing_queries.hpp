// Blocks of queries that pass a tile of keys: which they are, and what the loading warp tells of them.
#pragma once

#include "flashcute/core/backward_config.hpp"
#include "flashcute/core/backward_params.hpp"
#include "flashcute/policy/mask.hpp"
#include "flashcute/sm90/backward_workspace.hpp"
#include "flashcute/sm90/fragment.hpp"
#include "flashcute/sm90/ring.hpp"

namespace flashcute::sm90 {

/// Registers per thread of the warpgroup that serves, and of those that compute.
inline constexpr int serving_registers = 40, computing_registers = 232;

/// What the loading warp announces of the block in a place of Q's ring.
template <class Flag>
struct AnnouncedQueries {
  int row0;      // its first query
  int head;      // of the batch entry
  Flag partial;  // elements have to be tested
  Flag last;     // of the tile
};

/// Blocks of queries, each for all heads of a group before the next block. Tiles of one K/V head that run at the same
/// time stand at the same block of the same head, so what they read and add to is in the level 2 cache.
///
/// From the last block to the first: under a causal mask the ranges of all tiles have the same last block. Under a
/// window (TwoEdges) they have n blocks each, further on from tile to tile. There a tile goes round its range, from the
/// block whose number is n - 1 modulo n: where ranges overlap, tiles come to the same block at the same time.
template <bool TwoEdges>
struct QueriesInStep : PassingBlocks {
  int32_t first_head, end_of_heads;

  template <class Range>
  FLASHCUTE_HD static QueriesInStep of(Range const& r, int32_t complete, int32_t first_head, int32_t heads) {
    QueriesInStep at{PassingBlocks::of(r, complete, first_head, heads), first_head, first_head + heads};
    at.block = r.end - 1;
    if constexpr (TwoEdges) {
      bool const ends_early = r.end < complete;  // else the range is as under a causal mask
      if (ends_early && !r.empty()) at.block -= r.begin % (r.end - r.begin);
    }
    return at;
  }

  FLASHCUTE_HD QueriesInStep after() const {
    QueriesInStep next = *this;
    --next.left;
    if (++next.head == end_of_heads) {
      next.head = first_head;
      next.block = TwoEdges && block == begin ? end - 1 : block - 1;
    }
    return next;
  }
};

/// The blocks of `Queries` queries that pass a tile of keys.
template <BackwardKernelId Id, int Queries = Id.config.block_m>
struct PassingQueries {
  static constexpr BackwardConfig C = Id.config;
  using Mask = flashcute::Mask<Id.features.mask>;
  using Sequence = typename Mask::Sequence;
  using Tile = KeyTile<Sequence>;
  /// An order of additions, and passes of their own for wide heads, are for blocks from the first to the last.
  static constexpr bool in_step = Mask::Range::contiguous && !C.deterministic;
  using Passing = std_::conditional_t<in_step, QueriesInStep<Mask::two_edges>, typename Mask::Passing>;
  using Workspace = GradientWorkspace<C, Sequence, Queries>;

  FLASHCUTE_DEVICE static Passing of(BackwardParams const& p, Tile const& tile) {
    ForwardParams const& f = p.forward;
    int const group = f.heads / f.kv_heads;
    auto const range = Mask::query_range(tile, f, Queries);
    return Passing::of(range, tile.sequence(f).rows() / Queries, tile.kv_head * group, group);
  }

  /// Whether elements of the block have to be tested: also where keys are missing.
  FLASHCUTE_DEVICE static bool partial(BackwardParams const& p, Passing const& at, Tile const& tile) {
    return at.partial() || tile.existing(p.forward) < C.block_n;
  }
  /// Whether some of its rows see other keys of the tile than others do, so that its values are inspected. (Where
  /// queries are hidden on both sides, rows that do not exist may be another reason for a partial block.)
  FLASHCUTE_DEVICE static bool inspected(Passing const& at) {
    return Mask::rows_differ && (Mask::two_edges ? at.partial() : at.before_full());
  }
  /// Whether rows of the tile in shared memory hold what is not of its sequence: they are cleared.
  FLASHCUTE_DEVICE static bool has_foreign_keys(BackwardParams const& p, Tile const& tile) {
    return !Sequence::fills_tensors && tile.existing(p.forward) < C.block_n;
  }
};

}  // namespace flashcute::sm90
