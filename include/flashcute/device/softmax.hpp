// The online softmax: keeps, for every row this thread holds, a maximum of its scores and the sum of exponentials
// relative to it, and corrects sum and output when a new block raises the maximum.
#pragma once

#include "flashcute/core/constants.hpp"
#include "flashcute/core/forward_params.hpp"
#include "flashcute/device/fragment.hpp"

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
  FLASHCUTE_DEVICE float ratio(float x, float y) const { return exp2_approx(log2_ratio(x, y)); }
  FLASHCUTE_DEVICE float log2_ratio(float x, float y) const { return (x - y) * scale_log2_; }

  /// Calls f(x -> exp(scale * (x - y))).
  template <class F>
  FLASHCUTE_DEVICE void relative_to(float y, F const& f) const {
    float const base = y * scale_log2_;
    f([&](float x) { return exp2_approx(x * scale_log2_ - base); });
  }

  FLASHCUTE_DEVICE float base_of(float y) const { return y * scale_log2_; }
  FLASHCUTE_DEVICE float exponent(float x, float base) const { return x * scale_log2_ - base; }

  /// scale * x
  FLASHCUTE_DEVICE float scaled(float x) const { return x * scale_log2_ * ln2<float>; }

 private:
  float scale_log2_;
};

/// As in a textbook: scales all scores, then computes exp(score - maximum), each with a change to base 2.
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

  FLASHCUTE_DEVICE float ratio(float x, float y) const { return exp2_approx(log2_ratio(x, y)); }
  FLASHCUTE_DEVICE float log2_ratio(float x, float y) const { return (x - y) * log2_e<float>; }

  template <class F>
  FLASHCUTE_DEVICE void relative_to(float y, F const& f) const {
    f([&](float x) { return ratio(x, y); });
  }

  FLASHCUTE_DEVICE float scaled(float x) const { return x; }

 private:
  float scale_;  // above 0: with 0, a masked score of -inf would become NaN
};

/// The maximum that is subtracted need not be the latest one: any value near it keeps exponentials and sums in range,
/// and cancels at the end. So with a threshold t a row keeps its maximum until a score is so much larger that its
/// exponential would exceed 2^t, and a warp whose rows all keep theirs does not touch its output. Source of the idea:
/// FlashAttention-4.
///
/// Sink: a further logit, of value 0, may take part in the sum. It enters at the end, so that the blocks need no code.
template <int Rows, bool Optimized, int Threshold, bool Sink = false>
class OnlineSoftmax {
 public:
  static constexpr bool takes_sink = Sink;

  FLASHCUTE_DEVICE explicit OnlineSoftmax(ForwardParams const& p) : exponential_(p) {
    CUTE_UNROLL
    for (int i = 0; i < Rows; ++i) {
      row_max_[i] = -infinity;
      row_sum_[i] = 0.f;
    }
  }

  /// The factors by which sums and output so far have to be multiplied, row by row, to be relative to new maxima.
  struct Correction {
    float factor[Rows];
    bool any;  // whether a row of the warp has a new maximum; else all factors are 1
  };

  /// Turns the scores of one block into unnormalised probabilities, in place, and rescales the output
  /// accumulated so far to the new row maximum.
  template <class Scores, class Output>
  FLASHCUTE_DEVICE void update(Scores&& scores, Output&& output) {
    exponential_.prepare(scores);
    auto const correction = raise_max(scores);
    if (correction.any) {
      rescale(output, correction);
      rescale_sums(correction);
    }
    exponentiate(scores);
  }

  /// Calls wait(maxima). The next exponentials use the maxima as `wait` leaves them, so the compiler computes none
  /// earlier.
  template <class F>
  FLASHCUTE_DEVICE void hold_until(F const& wait) {
    wait(row_max_);
  }

  // For an output to which an asynchronous product still adds: the caller rescales it later.

  /// As `update`, but returns the factors for the output.
  template <class Scores>
  FLASHCUTE_DEVICE Correction update(Scores&& scores) {
    exponential_.prepare(scores);
    auto const correction = raise_max(scores);
    rescale_sums(correction);
    exponentiate(scores);
    return correction;
  }

  /// The same, but keeps the scores; the probabilities go to `p`, a fragment of their operand type.
  template <class Scores, class Probabilities>
  FLASHCUTE_DEVICE Correction update_into(Probabilities& p, Scores const& scores) {
    auto const correction = raise_max(scores);
    rescale_sums(correction);
    float added[Rows];
    exponentiate_into<true>(p, scores, added);
    return correction;
  }

  /// The same relative to the maxima so far, without a maximum over the scores: an exponential can exceed 2^Threshold
  /// only if what a thread adds to the row's sum does. Where it does, the maximum is raised and the exponentials are
  /// computed again. For a row that has no maximum yet the sum is infinity or NaN, which counts as exceeding.
  template <class Scores, class Probabilities>
  FLASHCUTE_DEVICE Correction update_by_stale_max(Probabilities& p, Scores const& scores) {
    float const limit = static_cast<float>(1 << Threshold);
    float sums[Rows], added[Rows];
    CUTE_UNROLL
    for (int i = 0; i < Rows; ++i) sums[i] = row_sum_[i];
    exponentiate_into<false>(p, scores, added);
    bool over = false;
    CUTE_UNROLL
    for (int i = 0; i < Rows; ++i) over = over || !(added[i] <= limit);
    Correction correction;
    correction.any = warp_any(over);
    if (correction.any) {
      CUTE_UNROLL
      for (int i = 0; i < Rows; ++i) {
        row_sum_[i] = sums[i];
        added[i] = quad_reduce(added[i], [](float a, float b) { return max_or_nan(a, b); });
      }
      // The other rows do not change, not even by rounding: a row's result does not depend on its neighbours.
      correction = raise_max_where(scores, [&](int i, float) { return !(added[i] <= limit); });
      rescale_sums(correction);
      exponentiate_into<true>(p, scores, added);
    }
    return correction;
  }

  template <class Output>
  FLASHCUTE_DEVICE static void rescale(Output&& output, Correction const& correction) {
    auto o = by_row_and_column(output);  // (row, head dim)
    CUTE_UNROLL
    for (int i = 0; i < Rows; ++i) {
      CUTE_UNROLL
      for (int j = 0; j < cute::size<1>(o); ++j) o(i, j) *= correction.factor[i];
    }
  }

  /// Divides the output by the row sums. `empty(i, sum)` says whether row i of this thread, which has that sum, sees no
  /// key: its output is 0. A row that sees keys, all with score -inf, becomes 0 * inf = NaN.
  template <class Output, class Empty>
    requires(!Sink)
  FLASHCUTE_DEVICE void finish(Output&& output, Empty const& empty) {
    using namespace cute;
    auto o = by_row_and_column(output);  // (row, head dim)
    CUTE_UNROLL
    for (int i = 0; i < Rows; ++i) {
      if constexpr (Optimized) row_sum_[i] = quad_sum(row_sum_[i]);
      float const inverse = empty(i, row_sum_[i]) ? 0.f : reciprocal_approx(row_sum_[i]);
      CUTE_UNROLL
      for (int j = 0; j < size<1>(o); ++j) o(i, j) *= inverse;
    }
  }

  /// The same with a sink; -inf is none. Rows that do not exist, or see no key, are set to 0: what they hold may be
  /// anything. Afterwards e^row_max_ * row_sum_ is the sum of exponentials.
  template <class Output, class Exists, class Empty>
    requires(Sink)
  FLASHCUTE_DEVICE void finish(Output&& output, float sink, Exists const& exists, Empty const& empty) {
    using namespace cute;
    auto o = by_row_and_column(output);  // (row, head dim)
    bool shown[Rows], any_hidden = false;
    float factor[Rows];
    CUTE_UNROLL
    for (int i = 0; i < Rows; ++i) {
      if constexpr (Optimized) row_sum_[i] = quad_sum(row_sum_[i]);
      row_max_[i] = exponential_.scaled(row_max_[i]);
      factor[i] = 1.f;
      shown[i] = exists(i) && !empty(i, row_sum_[i]);
      if (!shown[i]) row_sum_[i] = 0.f, row_max_[i] = -infinity;
      any_hidden = any_hidden || !shown[i];
    }
    if (sink != -infinity) {
      CUTE_UNROLL
      for (int i = 0; i < Rows; ++i) {
        float const highest = row_max_[i] > sink ? row_max_[i] : sink;  // NaN if the sink is NaN
        factor[i] = expf(row_max_[i] - highest);
        row_sum_[i] = row_sum_[i] * factor[i] + (sink == highest ? 1.f : expf(sink - highest));
        row_max_[i] = highest;
      }
    }
    CUTE_UNROLL
    for (int i = 0; i < Rows; ++i) {
      float const inverse = factor[i] * reciprocal_approx(row_sum_[i]);
      CUTE_UNROLL
      for (int j = 0; j < size<1>(o); ++j) o(i, j) *= inverse;
    }
    if (!warp_any(any_hidden)) return;
    CUTE_UNROLL
    for (int i = 0; i < Rows; ++i) {
      CUTE_UNROLL
      for (int j = 0; j < size<1>(o); ++j) o(i, j) = shown[i] ? o(i, j) : 0.f;
      if (!exists(i)) row_sum_[i] = 0.f, row_max_[i] = -infinity;
    }
  }

  /// Makes all results NaN, after `finish`.
  template <class Output>
  FLASHCUTE_DEVICE void spoil(Output&& output) {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(output); ++i) output(i) = infinity - infinity;
    CUTE_UNROLL
    for (int i = 0; i < Rows; ++i) row_sum_[i] = infinity - infinity;
  }

  /// log(sum(exp(scale * score))) of row i, after `finish`; -inf for an empty row.
  FLASHCUTE_DEVICE float lse(int i) const {
    // Written twice: with the base as a variable nvcc 13.0 makes other code of the kernels without a sink.
    if constexpr (Sink) return row_sum_[i] == 0.f ? -infinity : row_max_[i] + logf(row_sum_[i]);
    return row_sum_[i] == 0.f ? -infinity : exponential_.scaled(row_max_[i]) + logf(row_sum_[i]);
  }

 private:
  /// Raises the maxima of rows in which an exponential would exceed 2^Threshold.
  template <class Scores>
  FLASHCUTE_DEVICE Correction raise_max(Scores const& scores) {
    return raise_max_where(scores, [&](int i, float new_max) {
      return Threshold == 0 || exponential_.log2_ratio(new_max, row_max_[i]) > Threshold;
    });
  }

  /// Sets row i's maximum to the latest one if `raised(i, latest)`.
  template <class Scores, class Raised>
  FLASHCUTE_DEVICE Correction raise_max_where(Scores const& scores, Raised const& raised) {
    using namespace cute;
    auto s = by_row_and_column(scores);  // (row, column)
    Correction correction;
    bool any = false;
    CUTE_UNROLL
    for (int i = 0; i < Rows; ++i) {
      // fmaxf ignores NaN; a NaN score still becomes a NaN probability below.
      float new_max = row_max_[i];
      CUTE_UNROLL
      for (int j = 0; j < size<1>(s); ++j) new_max = fmaxf(new_max, s(i, j));
      new_max = quad_reduce(new_max, [](float a, float b) { return fmaxf(a, b); });
      bool const row_raised = raised(i, new_max);
      new_max = row_raised ? new_max : row_max_[i];
      any = any || row_raised;
      correction.factor[i] = exponential_.ratio(row_max_[i], shift_of(new_max));
      row_max_[i] = new_max;
    }
    correction.any = Threshold == 0 || warp_any(any);
    return correction;
  }

  FLASHCUTE_DEVICE void rescale_sums(Correction const& correction) {
    CUTE_UNROLL
    for (int i = 0; i < Rows; ++i) row_sum_[i] *= correction.factor[i];
  }

  /// Adds exponentials to the sums, and writes them, rounded, to `p`. Returns in `added` what this thread added to
  /// each.
  template <bool Shift, class Probabilities, class Scores>
  FLASHCUTE_DEVICE void exponentiate_into(Probabilities& p, Scores const& scores, float (&added)[Rows]) {
    using namespace cute;
    using Element = typename Probabilities::value_type;
    auto s = by_row_and_column(scores);  // (row, column)
    auto pairs = words_of(p);
    float sum[2 * Rows];
    float base[Rows];
    CUTE_UNROLL
    for (int i = 0; i < Rows; ++i) {
      base[i] = exponential_.base_of(Shift ? shift_of(row_max_[i]) : row_max_[i]);
    }
    // In the order of the accumulator's registers: pairs of columns, and for each the rows.
    CUTE_UNROLL
    for (int j = 0; j < size<1>(s) / 2; ++j) {
      CUTE_UNROLL
      for (int i = 0; i < Rows; ++i) {
        float x[2];
        CUTE_UNROLL
        for (int c = 0; c < 2; ++c) {
          x[c] = exp2_approx(exponential_.exponent(s(i, 2 * j + c), base[i]));
          sum[2 * i + c] = j == 0 ? x[c] : sum[2 * i + c] + x[c];
        }
        pairs(j * Rows + i) = round_pair<Element>(x[0], x[1]);
      }
    }
    CUTE_UNROLL
    for (int i = 0; i < Rows; ++i) {
      added[i] = sum[2 * i] + sum[2 * i + 1];
      row_sum_[i] += added[i];
    }
  }

  template <class Scores>
  FLASHCUTE_DEVICE void exponentiate(Scores& scores) {
    using namespace cute;
    auto s = by_row_and_column(scores);  // (row, column)
    CUTE_UNROLL
    for (int i = 0; i < Rows; ++i) {
      // Optimized: each lane keeps the sum of its own columns until `finish`.
      float sum = Optimized ? row_sum_[i] : 0.f;
      exponential_.relative_to(shift_of(row_max_[i]), [&](auto const& exponential) {
        CUTE_UNROLL
        for (int j = 0; j < size<1>(s); ++j) {
          s(i, j) = exponential(s(i, j));
          sum += s(i, j);
        }
      });
      row_sum_[i] = Optimized ? sum : row_sum_[i] + quad_sum(sum);
    }
  }

  /// What is subtracted from a row's scores: its maximum, or 0 while that is -inf because the row has seen no key: -inf
  /// - -inf is NaN.
  FLASHCUTE_DEVICE static float shift_of(float row_max) { return row_max == -infinity ? 0.f : row_max; }

  FLASHCUTE_DEVICE static float quad_sum(float x) {
    return quad_reduce(x, [](float a, float b) { return a + b; });
  }

  Exponential<Optimized> exponential_;
  float row_max_[Rows];
  float row_sum_[Rows];
};

}  // namespace flashcute
