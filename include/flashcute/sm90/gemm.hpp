// Products of a warpgroup (WGMMA), which are asynchronous: begun here, waited for later.
#pragma once

#include "flashcute/sm90/layout.hpp"
#include "flashcute/sm90/product.hpp"

namespace flashcute::sm90 {

template <ForwardConfig C>
struct Products {
  using L = ForwardLayout<C>;
  using Element = typename L::Element;

  /// Begins S = Q K^T.
  template <class Scores>
  FLASHCUTE_DEVICE static void begin_scores(Scores& scores, Element* q, InRing<Element> k) {
    using namespace cute;
    typename L::MmaS mma;
    mma.accumulate_ = GMMA::ScaleOut::Zero;
    auto tSrQ = described<typename L::MmaS::FrgTypeA, typename L::OperandQ>(q);             // (MMA, 1, MMA_D)
    auto const tSrK = described<typename L::MmaS::FrgTypeB, typename L::OperandK>(k.ring);  // (MMA, 1, MMA_D, STAGE)
    // Otherwise the compiler keeps the descriptors of so many operands in registers across the loop, and these spill.
    if constexpr (size<2>(tSrQ) > 8) described_anew(tSrQ);
    auto tSrS = as_warpgroup_accumulator(scores);
    keep_in_place(tSrS);
    begin_products();
    CUTE_UNROLL
    for (int i = 0; i < size<2>(tSrQ); ++i) {
      multiply(mma, tSrS, step_of(tSrQ, i), step_of(in_place(tSrK, k.place), i));
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    commit_products();
    keep_in_place(tSrS);
  }

  /// Begins O += P V, or O = P V if `fresh`. P is in registers, which must not change until the product is done.
  template <class Output, class Probabilities>
  FLASHCUTE_DEVICE static void begin_output(Output& output, Probabilities& p, InRing<Element> v, bool fresh) {
    using namespace cute;
    typename L::MmaO mma;
    mma.accumulate_ = fresh ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One;
    auto const tOrV = described<typename L::MmaO::FrgTypeB, typename L::OperandV>(v.ring);  // (MMA, 1, MMA_N, STAGE)
    auto tOrO = as_warpgroup_accumulator(output);
    auto const tOrP = as_operand_a<Element>(p);  // ((2, 2, 2), 1, N / 16)
    keep_in_place(p);
    keep_in_place(tOrO);
    begin_products();
    CUTE_UNROLL
    for (int i = 0; i < size<2>(tOrP); ++i) {
      multiply(mma, tOrO, tOrP(_, 0, i), step_of(in_place(tOrV, v.place), i));
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    commit_products();
    keep_in_place(tOrO);
  }

  /// Waits until at most `Pending` of the products that were begun are not done.
  template <int Pending, class... Accumulators>
  FLASHCUTE_DEVICE static void finish(Accumulators&... done) {
    wait_for_products<Pending>();
    (keep_in_place(done), ...);
  }

  /// Probabilities as P V's operand.
  template <class Scores>
  FLASHCUTE_DEVICE static auto probabilities(Scores const& scores) {
    return convert<Element>(scores);
  }

  /// Copies between registers, at this place: an operand must not change while products that read it may be in flight,
  /// and the compiler would otherwise remove the copy.
  template <class Probabilities>
  FLASHCUTE_DEVICE static void move(Probabilities const& from, Probabilities& to) {
    auto const source = words_of(from);
    auto const target = words_of(to);
    CUTE_UNROLL
    for (int i = 0; i < cute::size(target); ++i) target(i) = moved(source(i));
  }
};

}  // namespace flashcute::sm90
