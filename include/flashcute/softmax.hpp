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

/// How scores become exponentials. Optimized: a score is scaled in the multiply-add that subtracts the
/// maximum, in units of log2.
template <bool Optimized>
class Exponential {
 public:
  FLASHCUTE_DEVICE explicit Exponential(ForwardParams const& p) : scale_log2_(p.scale_log2) {}

  template <class Scores>
  FLASHCUTE_DEVICE void prepare(Scores&&) const {}

  /// exp(scale * (x - y)). The difference comes first, so that x = y gives exactly 1. As a fused multiply-add of
  /// a rounded product it would give 1 + a rounding error, which a long row would raise to a high power.
  FLASHCUTE_DEVICE float ratio(float x, float y) const { return exp2_approx((x - y) * scale_log2_); }

  /// Calls f(x -> exp(scale * (x - y))).
  template <class F>
  FLASHCUTE_DEVICE void relative_to(float y, F const& f) const {
    float const base = y * scale_log2_;
    f([&](float x) { return exp2_approx(x * scale_log2_ - base); });
  }

  /// scale * x
  FLASHCUTE_DEVICE float scaled(float x) const { return x * scale_log2_ * ln2; }

 private:
  static constexpr float ln2 = 0.693147180559945309f;

  float scale_log2_;
};

/// As in a textbook: scale all scores, then exp(score - maximum), with the base changed in each.
template <>
class Exponential<false> {
 public:
  FLASHCUTE_DEVICE explicit Exponential(ForwardParams const& p)
      : scale_(max_of(static_cast<float>(p.scale), smallest_normal)) {}

  template <class Scores>
  FLASHCUTE_DEVICE void prepare(Scores&& scores) const {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) scores(i) *= scale_;
  }

  FLASHCUTE_DEVICE float ratio(float x, float y) const { return exp2_approx((x - y) * log2_e); }

  template <class F>
  FLASHCUTE_DEVICE void relative_to(float y, F const& f) const {
    f([&](float x) { return ratio(x, y); });
  }

  FLASHCUTE_DEVICE float scaled(float x) const { return x; }

 private:
  static constexpr float log2_e = 1.442695040888963407f;

  float scale_;  // above 0: a masked score stays -inf
};

template <int Rows, bool Optimized>
class OnlineSoftmax {
 public:
  FLASHCUTE_DEVICE explicit OnlineSoftmax(ForwardParams const& p) : exponential_(p) {
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
    exponential_.prepare(scores);
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
      float const correction = exponential_.ratio(row_max_[i], shift);
      row_max_[i] = new_max;
      CUTE_UNROLL
      for (int j = 0; j < size<1>(o); ++j) o(i, j) *= correction;

      // Optimized: each lane keeps the sum of its own columns until `finish`.
      float sum = Optimized ? row_sum_[i] * correction : 0.f;
      exponential_.relative_to(shift, [&](auto const& exponential) {
        CUTE_UNROLL
        for (int j = 0; j < size<1>(s); ++j) {
          s(i, j) = exponential(s(i, j));
          sum += s(i, j);
        }
      });
      row_sum_[i] = Optimized ? sum : row_sum_[i] * correction + quad_sum(sum);
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
      if constexpr (Optimized) row_sum_[i] = quad_sum(row_sum_[i]);
      float const inverse = empty(i) ? 0.f : reciprocal_approx(row_sum_[i]);
      CUTE_UNROLL
      for (int j = 0; j < size<1>(o); ++j) o(i, j) *= inverse;
    }
  }

  /// log(sum(exp(scale * score))) of row i, after `finish`; -inf for an empty row.
  FLASHCUTE_DEVICE float lse(int i) const {
    return row_sum_[i] == 0.f ? -infinity : exponential_.scaled(row_max_[i]) + logf(row_sum_[i]);
  }

 private:
  FLASHCUTE_DEVICE static float quad_sum(float x) {
    return quad_reduce(x, [](float a, float b) { return a + b; });
  }

  Exponential<Optimized> exponential_;
  float row_max_[Rows];
  float row_sum_[Rows];
};

}  // namespace flashcute
