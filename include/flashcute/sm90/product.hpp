// One product of a warpgroup, step by step: begun here, waited for by finish_products.
#pragma once

#include "flashcute/sm90/fragment.hpp"
#include "flashcute/sm90/ring.hpp"

namespace flashcute::sm90 {

/// A place of a ring of operands.
template <class Operand>
FLASHCUTE_DEVICE auto in_place(Operand const& ring, int place) {
  using namespace cute;
  return ring(_, _, _, place);
}

/// Step `i` of an operand, of which each sums over 16. The matrix descriptor of a step is the first one's and an
/// offset, added as numbers of 64 bits: ptxas has one instruction for that (UIADD3.64). CuTe adds the lower halves, and
/// ptxas then copies the upper one before each product.
template <class Operand>
FLASHCUTE_DEVICE auto step_of(Operand const& operand, int i) {
  using namespace cute;
  if constexpr (is_same_v<typename Operand::iterator, GMMA::DescriptorIterator>) {
    auto step = operand(_, 0, 0);
    step.data().desc_.desc_ += static_cast<uint64_t>(operand.layout()(0, 0, i));
    return step;
  } else {
    return operand(_, 0, i);
  }
}

/// Begins sums = a b or sums += a b. `LongSteps`: by step_of.
template <class Mma, bool LongSteps = true, class Sums, class A, class B>
FLASHCUTE_DEVICE void begin_product(Sums& sums, cute::GMMA::ScaleOut first, A const& a, B const& b) {
  using namespace cute;
  Mma mma;
  mma.accumulate_ = first;
  auto c = as_warpgroup_accumulator(sums);
  keep_in_place(c);
  begin_products();
  CUTE_UNROLL
  for (int i = 0; i < size<2>(b); ++i) {
    if constexpr (LongSteps) {
      multiply(mma, c, step_of(a, i), step_of(b, i));
    } else {
      multiply(mma, c, a(_, 0, i), b(_, 0, i));
    }
    mma.accumulate_ = GMMA::ScaleOut::One;
  }
  commit_products();
  keep_in_place(c);
}

}  // namespace flashcute::sm90
