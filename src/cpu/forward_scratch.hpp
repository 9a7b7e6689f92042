// The layout of the scratch memory of one forward tile, which dispatch.cpp allocates and forward_impl.hpp uses, once
// per instruction set.
#pragma once

#include "flashcute/core/forward_config.hpp"
#include "flashcute/policy/kv_blocks.hpp"

namespace flashcute::cpu {

inline constexpr int64_t scratch_alignment = 64;

/// The size of a RowRange in elements of the narrower accumulation type.
inline constexpr int64_t elements_per_range = sizeof(RowRange) / sizeof(float);

/// Offsets in elements of the accumulation type. Matrices with a column per query are transposed: queries are in vector
/// lanes.
struct ForwardScratch {
  int64_t ld;          // columns of `q`, `scores` and what follows
  int64_t q;           // (head_dim, ld)   Q^T, each column times the first part of the scores' factor
  int64_t scores;      // (block_n, ld)    S^T, then P^T
  int64_t row_sum;     // (ld)
  int64_t out;         // (head_dim_v, ld) unnormalised O^T, right after row_sum: `totals` sums both
  int64_t totals;      // (1 + head_dim_v, ld), as row_sum and out
  int64_t errors;      // (1 + head_dim_v, ld)
  int64_t row_max;     // (ld)
  int64_t correction;  // (ld)
  int64_t pending;     // (ld)             the factor that `totals` still have to be multiplied by
  int64_t factor;      // (ld)             the second part of the scores' factor
  int64_t k, v;        // (block_n, head_dim), (block_n, head_dim_v): widened blocks of 16-bit inputs
  int64_t finite_v;    // (block_n, head_dim_v)
  int64_t visible;     // (ld)             which keys each query sees: a RowRange
  int64_t elements;

  FLASHCUTE_HD static constexpr ForwardScratch of(ForwardConfig const& c) {
    int64_t const line = 16;  // elements: at least one cache line, and the widest vector, of floats
    ForwardScratch s{};
    s.ld = ceil_div<int64_t>(c.block_m, line) * line;
    auto const block = [&](int64_t d) { return ceil_div<int64_t>(c.block_n * d, line) * line; };
    s.scores = s.q + c.head_dim * s.ld;
    s.row_sum = s.scores + c.block_n * s.ld;
    s.out = s.row_sum + s.ld;
    s.totals = s.out + c.head_dim_v * s.ld;
    s.errors = s.totals + (1 + c.head_dim_v) * s.ld;
    s.row_max = s.errors + (1 + c.head_dim_v) * s.ld;
    s.correction = s.row_max + s.ld;
    s.pending = s.correction + s.ld;
    s.factor = s.pending + s.ld;
    s.k = s.factor + s.ld;
    s.v = s.k + block(c.head_dim);
    s.finite_v = s.v + block(c.head_dim_v);
    s.visible = s.finite_v + block(c.head_dim_v);
    s.elements = s.visible + elements_per_range * s.ld;
    return s;
  }
};

}  // namespace flashcute::cpu
