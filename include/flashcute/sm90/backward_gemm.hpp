// The five products of the backward as a warpgroup begins them (WGMMA): asynchronous, waited for by finish_products.
#pragma once

#include "flashcute/sm90/backward_layout.hpp"
#include "flashcute/sm90/product.hpp"

namespace flashcute::sm90 {

/// `LongSteps`: by step_of.
template <BackwardConfig C, bool LongSteps>
struct BackwardProducts {
  using L = BackwardLayout<C>;
  using Element = typename L::Element;

  /// Begins scores = own other^T: S^T = K Q^T, or dP^T = V dO^T. `own`: the warpgroup's keys of K or V; `other`: a
  /// place of a ring of `Places` blocks.
  template <int Places, class Scores>
  FLASHCUTE_DEVICE static void begin_scores(Scores& scores, Element* own, InRing<Element> other) {
    using Mma = typename L::MmaScores;
    begin_product<Mma, LongSteps>(
        scores, cute::GMMA::ScaleOut::Zero, described<typename Mma::FrgTypeA, typename L::OperandKeys>(own),
        in_place(described<typename Mma::FrgTypeB, typename L::template OperandQueries<Places>>(other.ring),
                 other.place));
  }

  /// Begins sums += weights other: dV += P^T dO, or dK += dS^T Q. The weights are in registers, which must not change
  /// until the product is done.
  template <int Places, class Sums, class Weights>
  FLASHCUTE_DEVICE static void begin_sums(Sums& sums, Weights& weights, InRing<Element> other) {
    using Mma = typename L::MmaKeys;
    keep_in_place(weights);
    begin_product<Mma, LongSteps>(
        sums, cute::GMMA::ScaleOut::One, as_operand_a<Element>(weights),
        in_place(described<typename Mma::FrgTypeB, typename L::template OperandQueryColumns<Places>>(other.ring),
                 other.place));
  }

  /// Begins dQ = dS K, the warpgroup's half. `ds`: its first query; `k`: its first column.
  template <class Sums>
  FLASHCUTE_DEVICE static void begin_dq(Sums& sums, InRing<Element> ds, Element* k) {
    using Mma = typename L::MmaQueries;
    begin_product<Mma, LongSteps>(sums, cute::GMMA::ScaleOut::Zero,
                                  in_place(described<typename Mma::FrgTypeA, typename L::OperandDs>(ds.ring), ds.place),
                                  described<typename Mma::FrgTypeB, typename L::OperandKeyColumns>(k));
  }
};

}  // namespace flashcute::sm90
