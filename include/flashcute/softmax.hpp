// The online softmax: keeps, for every row this thread holds, the maximum score so far and the sum of
// exponentials relative to it, and corrects both when a new block raises the maximum.
#pragma once

#include "flashcute/fragment.hpp"
#include "flashcute/params.hpp"

namespace flashcute {

/// Combines a value over the quad of lanes that shares a row.
template <class Op>
FLASHCUTE_DEVICE float quad_reduce(float x, Op const& op) {
  x = op(x, shuffle_xor(x, 2));
  return op(x, shuffle_xor(x, 1));
}

template <int Rows>
class OnlineSoftmax {
 public:
  FLASHCUTE_DEVICE explicit OnlineSoftmax(ForwardParams const& p) : scale_log2_(p.scale_log2) {
    CUTE_UNROLL
    for (int i = 0; i < Rows; ++i) {
      row_max_[i] = -infinity;
      row_sum_[i] = 0.f;
    }
  }

  /// Turns the scores of one block into unnormalised probabilities, in place, and rescales the output
  /// accumulated so far to the new row maximum.
  template <class Scores, class Output>
  FLASHCUTE_DEVICE void update(Scores&& scores, Output&& output) {
    using namespace cute;
    auto s = by_row_and_column(scores);  // (row, column)
    auto o = by_row_and_column(output);  // (row, head dim)
    CUTE_UNROLL
    for (int i = 0; i < Rows; ++i) {
      // fmaxf passes over NaN; a NaN score still becomes a NaN probability below.
      float block_max = s(i, 0);
      CUTE_UNROLL
      for (int j = 1; j < size<1>(s); ++j) block_max = fmaxf(block_max, s(i, j));
      block_max = quad_reduce(block_max, [](float a, float b) { return fmaxf(a, b); });

      float const new_max = fmaxf(row_max_[i], block_max);
      // A row that has seen no key keeps -inf: subtract 0 then, because -inf - -inf is NaN.
      float const shift = new_max == -infinity ? 0.f : new_max;
      // The difference comes first, so that an unchanged maximum gives exactly 1. As a fused multiply-add of the
      // rounded product it would give 1 + a rounding error, which a long row would raise to a high power.
      float const correction = exp2_approx((row_max_[i] - shift) * scale_log2_);
      float const base = shift * scale_log2_;
      row_max_[i] = new_max;
      row_sum_[i] *= correction;
      CUTE_UNROLL
      for (int j = 0; j < size<1>(o); ++j) o(i, j) *= correction;

      CUTE_UNROLL
      for (int j = 0; j < size<1>(s); ++j) {
        s(i, j) = exp2_approx(s(i, j) * scale_log2_ - base);
        row_sum_[i] += s(i, j);
      }
    }
  }

  /// Divides the output by the row sums. `empty(i)` tells whether row i of this thread sees no key:
  /// its output is 0. A row that sees keys, all with score -inf, becomes 0 * inf = NaN.
  template <class Output, class Empty>
  FLASHCUTE_DEVICE void finish(Output&& output, Empty const& empty) {
    using namespace cute;
    auto o = by_row_and_column(output);  // (row, head dim)
    CUTE_UNROLL
    for (int i = 0; i < Rows; ++i) {
      row_sum_[i] = quad_reduce(row_sum_[i], [](float a, float b) { return a + b; });
      float const inverse = empty(i) ? 0.f : reciprocal_approx(row_sum_[i]);
      CUTE_UNROLL
      for (int j = 0; j < size<1>(o); ++j) o(i, j) *= inverse;
    }
  }

  /// log(sum(exp(scale * score))) of row i, after `finish`; -inf for an empty row.
  FLASHCUTE_DEVICE float lse(int i) const {
    constexpr float ln2 = 0.693147180559945309f;
    return row_sum_[i] == 0.f ? -infinity : row_max_[i] * scale_log2_ * ln2 + logf(row_sum_[i]);
  }

 private:
  float scale_log2_;
  float row_max_[Rows];
  float row_sum_[Rows];
};

}  // namespace flashcute
