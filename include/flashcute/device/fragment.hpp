// What a thread does with the matrix fragments in its registers: views by row and column, reuse of an
// accumulator as an operand, rounding to 16 bits.
#pragma once

#include "flashcute/device/instructions.hpp"

namespace flashcute {

/// Views an accumulator (MMA = (2, 2), MMA_M, MMA_N) by mathematical (row, column).
template <class Tensor>
FLASHCUTE_DEVICE auto by_row_and_column(Tensor&& acc) {
  using namespace cute;
  auto const l = acc.layout();
  return make_tensor(acc.data(), make_layout(make_layout(get<0, 1>(l), get<1>(l)),    // row:    (2, MMA_M)
                                             make_layout(get<0, 0>(l), get<2>(l))));  // column: (2, MMA_N)
}

/// Views an accumulator of probabilities (MMA = (2, 2), MMA_M, MMA_N) as the A operand, of type To, of the next
/// product, without any shuffle between lanes. In 16 bits two n8 accumulators side by side are one k16 operand ((2, 2,
/// 2), MMA_M, MMA_N / 2). In TF32 an n8 accumulator is a k8 operand ((2, 2), MMA_M, MMA_N) if key 2 i counts as the
/// operand's i-th and key 2 i + 1 as its (i + 4)-th; V's operand has to use the same order.
template <class To, class Tensor>
FLASHCUTE_DEVICE auto as_operand_a(Tensor&& acc) {
  using namespace cute;
  if constexpr (sizeof(To) == 2) {
    // The same as logical_divide by 2, written out: deriving it in every kernel costs compile time.
    auto const l = acc.layout();
    auto const n = stride<2>(l);
    return make_tensor(acc.data(), make_layout(make_layout(get<0, 0>(l), get<0, 1>(l), make_layout(_2{}, n)), get<1>(l),
                                               make_layout(Int<decltype(size<2>(l))::value / 2>{}, _2{} * n)));
  } else {
    auto const l = acc.layout();
    return make_tensor(acc.data(), make_layout(make_layout(get<0, 1>(l), get<0, 0>(l)), get<1>(l), get<2>(l)));
  }
}

/// A number as an operand: rounded to TF32, or unchanged for products that split it into parts (tf32x3).
template <class To>
FLASHCUTE_DEVICE To to_operand(float x) {
  if constexpr (std_::is_same_v<To, float>)
    return x;
  else
    return round_tf32(x);
}

/// A compact fragment as 32-bit words, in the order of its registers. (CuTe's recast keeps the shape; deriving that for
/// every fragment costs compile time.)
template <class Fragment>
FLASHCUTE_DEVICE auto words_of(Fragment&& fragment) {
  using namespace cute;
  using Element = std_::remove_reference_t<decltype(*fragment.data())>;
  using Word = std_::conditional_t<std_::is_const_v<Element>, uint32_t const, uint32_t>;
  constexpr int count = decltype(cosize(fragment.layout()))::value * sizeof(Element) / sizeof(Word);
  return make_tensor(recast_ptr<Word>(fragment.data()), Layout<Int<count>>{});
}

/// An fp32 fragment in the type of an operand or of the output, rounded to nearest.
template <class To, class Tensor>
FLASHCUTE_DEVICE auto convert(Tensor const& from) {
  using namespace cute;
  auto to = make_tensor<To>(from.shape());
  if constexpr (sizeof(To) == 2) {
    auto pairs = words_of(to);
    CUTE_UNROLL
    for (int i = 0; i < size(pairs); ++i) pairs(i) = round_pair<To>(from(2 * i), from(2 * i + 1));
  } else {
    CUTE_UNROLL
    for (int i = 0; i < size(to); ++i) {
      to(i) = to_operand<To>(from(i));
    }
  }
  return to;
}

/// Limits a fragment of P to 1: where scores are large, their rounding errors can make it exceed 1. NaN stays NaN.
template <class Element, class Probabilities>
FLASHCUTE_DEVICE void hold_at_one(Probabilities& probabilities) {
  auto words = words_of(probabilities);
  CUTE_UNROLL
  for (int i = 0; i < cute::size(words); ++i) words(i) = at_most_one<Element>(words(i));
}

}  // namespace flashcute
