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

/// Begins sums = a b or sums += a b.
template <class Mma, class Sums, class A, class B>
FLASHCUTE_DEVICE void begin_product(Sums& sums, cute::GMMA::ScaleOut first, A const& a, B const& b) {
  using namespace cute;
  Mma mma;
  mma.accumulate_ = first;
  auto c = as_warpgroup_accumulator(sums);
  keep_in_place(c);
  begin_products();
  CUTE_UNROLL
  for (int i = 0; i < size<2>(b); ++i) {
    multiply(mma, c, a(_, 0, i), b(_, 0, i));
    mma.accumulate_ = GMMA::ScaleOut::One;
  }
  commit_products();
  keep_in_place(c);
}

}  // namespace flashcute::sm90
