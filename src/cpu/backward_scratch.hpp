// The layout of the scratch memory of one backward tile, which dispatch.cpp allocates and backward_impl.hpp uses, once
// per instruction set.
#pragma once

#include "cpu/forward_scratch.hpp"
#include "flashcute/core/backward_config.hpp"

namespace flashcute::cpu {

/// Offsets in elements of the accumulation type. X is Q or K, the tile's side of the scores; Y is dO or V, its side of
/// dP.
struct BackwardScratch {
  int64_t ld;      // columns of the matrices with a column per lane
  int64_t x, y;    // (head_dim, ld), (head_dim_v, ld)   X^T, Y^T of the tile, times parts of factors
  int64_t factor;  // (ld)                               the other part of that of the scores
  int64_t p, ds;   // (block, ld)                        probabilities, gradients of the scores
  int64_t dx, dy;  // (head_dim, ld), (head_dim_v, ld)   sums over some blocks
  int64_t dx_totals, dx_errors, dy_totals, dy_errors;  // of the same shapes
  int64_t lse, delta;                                  // one for each query
  int64_t block_x, block_y;   // (block, head_dim), (block, head_dim_v): widened blocks of 16-bit inputs
  int64_t finite;             // (block, the larger head dim)
  int64_t out_row, dout_row;  // (head_dim_v): one row of each, padded to whole vectors
  int64_t visible;            // which keys each query sees: a RowRange
  int64_t elements;

  FLASHCUTE_HD static constexpr BackwardScratch of(BackwardConfig const& c, BackwardPass pass) {
    int64_t const line = 16;  // elements: at least one cache line, and the widest vector, of floats
    auto const padded = [&](int64_t n) { return ceil_div<int64_t>(n, line) * line; };
    int64_t const columns = pass == BackwardPass::queries ? c.block_m : c.block_n;
    int64_t const rows = pass == BackwardPass::queries ? c.block_n : c.block_m;
    BackwardScratch s{};
    s.ld = padded(columns);
    auto const take = [&](int64_t n) {
      int64_t const at = s.elements;
      s.elements += padded(n);
      return at;
    };
    s.x = take(c.head_dim * s.ld);
    s.y = take(c.head_dim_v * s.ld);
    s.p = take(rows * s.ld);
    s.ds = take(rows * s.ld);
    s.dx = take(c.head_dim * s.ld);
    s.dy = take(c.head_dim_v * s.ld);
    s.factor = take(s.ld);
    s.dx_totals = take(c.head_dim * s.ld);
    s.dx_errors = take(c.head_dim * s.ld);
    s.dy_totals = take(c.head_dim_v * s.ld);
    s.dy_errors = take(c.head_dim_v * s.ld);
    s.lse = take(max_of(rows, s.ld));
    s.delta = take(max_of(rows, s.ld));
    s.block_x = take(rows * c.head_dim);
    s.block_y = take(rows * c.head_dim_v);
    s.finite = take(rows * max_of(c.head_dim, c.head_dim_v));
    s.out_row = take(c.head_dim_v);
    s.dout_row = take(c.head_dim_v);
    s.visible = take(elements_per_range * max_of(rows, s.ld));
    return s;
  }
};

}  // namespace flashcute::cpu
