// What the passes of Hopper's gradients leave for each other in memory.
#pragma once

#include "flashcute/sm90/backward_layout.hpp"
#include "flashcute/sm90/passes_in_turn.hpp"

namespace flashcute::sm90 {

/// A tile's statistics and sums in the workspace: every head has whole blocks of `block_m` queries.
template <BackwardConfig C>
struct GradientWorkspace {
  static constexpr int sums_of_block = C.block_m * C.head_dim;

  FLASHCUTE_HD static int64_t blocks(ForwardParams const& p) { return ceil_div(p.seqlen_q, C.block_m); }
  /// The number of a block among those of all heads.
  FLASHCUTE_HD static int64_t number(ForwardParams const& p, int batch, int head, int block) {
    return (static_cast<int64_t>(batch) * p.heads + head) * blocks(p) + block;
  }

  /// Of block `number`: the base-2 LSE and delta of its queries, and the sums of dQ / scale.
  FLASHCUTE_HD static float* lse(BackwardParams const& p, int64_t number) {
    return static_cast<float*>(p.delta) + number * C.block_m;
  }
  FLASHCUTE_HD static float* delta(BackwardParams const& p, int64_t number) { return lse(p, all_blocks(p) + number); }
  FLASHCUTE_HD static float* sums(BackwardParams const& p, int64_t number) {
    return static_cast<float*>(p.dq_sums) + number * sums_of_block;
  }

  /// If deterministic: how many tiles of keys have added to a warpgroup's half of block `number`.
  FLASHCUTE_HD static uint32_t* added(BackwardParams const& p, int64_t number, int warpgroup) {
    return counters(p) + number * warpgroups + warpgroup;
  }
  /// The same: how many tiles of keys have been started.
  FLASHCUTE_HD static uint32_t* started(BackwardParams const& p) { return counters(p) + all_blocks(p) * warpgroups; }

 private:
  static constexpr int warpgroups = C.num_warps / 4;

  FLASHCUTE_HD static int64_t all_blocks(BackwardParams const& p) {
    return static_cast<int64_t>(p.forward.batch) * p.forward.heads * blocks(p.forward);
  }
  FLASHCUTE_HD static uint32_t* counters(BackwardParams const& p) {
    return reinterpret_cast<uint32_t*>(sums(p, all_blocks(p)));
  }
};

}  // namespace flashcute::sm90
