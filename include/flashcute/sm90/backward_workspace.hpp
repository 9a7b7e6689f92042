// What the passes of Hopper's gradients leave for each other in memory.
#pragma once

#include "flashcute/core/backward_config.hpp"
#include "flashcute/core/backward_params.hpp"
#include "flashcute/policy/query_tile.hpp"

namespace flashcute::sm90 {

/// Statistics and sums in the workspace, in blocks of `Queries` queries: every head, and each of packed sequences, has
/// whole tiles of `block_m`.
template <BackwardConfig C, class Sequence, int Queries = C.block_m>
struct GradientWorkspace {
  static constexpr int sums_of_block = Queries * C.head_dim;

  /// Of a head.
  FLASHCUTE_HD static int64_t blocks(ForwardParams const& p) {
    return QueryTile<Sequence>::blocks_of_head(p, C.block_m) * blocks_of_tile;
  }
  /// The number of a head's first block among those of all heads.
  FLASHCUTE_HD static int64_t first_of_head(ForwardParams const& p, int batch, int head) {
    return (static_cast<int64_t>(batch) * p.heads + head) * blocks(p);
  }
  /// The number of a sequence's block.
  FLASHCUTE_HD static int64_t number(ForwardParams const& p, typename Sequence::Entry const& entry, int head,
                                     int block) {
    return first_of_head(p, entry.batch, head) + (entry.first_query_block(C.block_m) * blocks_of_tile + block);
  }

  /// Of block `number`: the base-2 LSE and delta of its queries, and the sums of dQ / scale.
  FLASHCUTE_HD static float* lse(BackwardParams const& p, int64_t number) {
    return static_cast<float*>(p.delta) + number * Queries;
  }
  FLASHCUTE_HD static float* delta(BackwardParams const& p, int64_t number) { return lse(p, all_blocks(p) + number); }
  FLASHCUTE_HD static float* sums(BackwardParams const& p, int64_t number) {
    return static_cast<float*>(p.dq_sums) + number * sums_of_block;
  }

  /// A counter from which thread blocks take tiles of keys.
  FLASHCUTE_HD static uint32_t* started(BackwardParams const& p) {
    return reinterpret_cast<uint32_t*>(sums(p, all_blocks(p)));
  }
  /// If additions to the sums have an order: how many tiles have added to a warpgroup's half of block `number`.
  FLASHCUTE_HD static uint32_t* added(BackwardParams const& p, int64_t number, int warpgroup) {
    return started(p) + 1 + number * warpgroups + warpgroup;
  }

 private:
  static constexpr int blocks_of_tile = C.block_m / Queries, warpgroups = C.num_warps / 4;

  FLASHCUTE_HD static int64_t all_blocks(BackwardParams const& p) {
    return static_cast<int64_t>(p.forward.batch) * p.forward.heads * blocks(p.forward);
  }
};

}  // namespace flashcute::sm90
