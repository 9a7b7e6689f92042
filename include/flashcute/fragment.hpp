// What a thread does with the matrix fragments in its registers: views by row and column, reuse of an
// accumulator as an operand, rounding to 16 bits.
#pragma once

#include "flashcute/layout.hpp"

namespace flashcute {

/// Views an accumulator (MMA = (2, 2), MMA_M, MMA_N) by mathematical (row, column).
template <class Tensor>
FLASHCUTE_DEVICE auto by_row_and_column(Tensor&& acc) {
  using namespace cute;
  auto const l = acc.layout();
  return make_tensor(acc.data(), make_layout(make_layout(get<0, 1>(l), get<1>(l)),    // row:    (2, MMA_M)
                                             make_layout(get<0, 0>(l), get<2>(l))));  // column: (2, MMA_N)
}

/// Views an accumulator (MMA = (2, 2), MMA_M, MMA_N) as the A operand ((2, 2, 2), MMA_M, MMA_N / 2) of the
/// next product: two n8 accumulators side by side are one k16 operand, so no lane exchanges anything.
template <class Tensor>
FLASHCUTE_DEVICE auto as_operand_a(Tensor&& acc) {
  using namespace cute;
  auto const l = logical_divide(acc.layout(), Shape<X, X, _2>{});  // ((2, 2), MMA_M, (2, MMA_N / 2))
  return make_tensor(acc.data(),
                     make_layout(make_layout(get<0, 0>(l), get<0, 1>(l), get<2, 0>(l)), get<1>(l), get<2, 1>(l)));
}

/// Rounds an fp32 fragment to a 16-bit element type.
template <class To, class Tensor>
FLASHCUTE_DEVICE auto convert(Tensor const& from) {
  using namespace cute;
  auto to = make_fragment_like<To>(from);
  auto pairs = recast<uint32_t>(to);
  CUTE_UNROLL
  for (int i = 0; i < size(pairs); ++i) pairs(i) = round_pair<To>(from(2 * i), from(2 * i + 1));
  return to;
}

}  // namespace flashcute
