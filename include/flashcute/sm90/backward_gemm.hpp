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

  /// Two operands in shared memory, described before they are waited for.
  template <class A, class B>
  struct Operands {
    A a;
    B b;

    FLASHCUTE_DEVICE Operands(A const& of_a, B const& of_b) : a(of_a), b(of_b) {
      if constexpr (!C.deterministic) {  // such tiles gain nothing
        described_here(a);
        described_here(b);
      }
    }
  };

  /// Of own other^T: `own`: the warpgroup's keys of K or V; `other`: a place of a ring of `Places` blocks.
  template <int Places>
  FLASHCUTE_DEVICE static auto operands_of_scores(Element* own, InRing<Element> other) {
    using Mma = typename L::MmaScores;
    return Operands(described<typename Mma::FrgTypeA, typename L::OperandKeys>(own),
                    in_place(described<typename Mma::FrgTypeB, typename L::template OperandQueries<Places>>(other.ring),
                             other.place));
  }

  /// Begins S^T = K Q^T, or dP^T = V dO^T.
  template <class Scores, class A, class B>
  FLASHCUTE_DEVICE static void begin_scores(Scores& scores, Operands<A, B> const& of) {
    begin_product<typename L::MmaScores, LongSteps>(scores, cute::GMMA::ScaleOut::Zero, of.a, of.b);
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

  /// Of the warpgroup's half of dS K. `ds`: its first query; `k`: its first column.
  FLASHCUTE_DEVICE static auto operands_of_dq(InRing<Element> ds, Element* k) {
    using Mma = typename L::MmaQueries;
    return Operands(in_place(described<typename Mma::FrgTypeA, typename L::OperandDs>(ds.ring), ds.place),
                    described<typename Mma::FrgTypeB, typename L::OperandKeyColumns>(k));
  }

  /// Begins dQ = dS K.
  template <class Sums, class A, class B>
  FLASHCUTE_DEVICE static void begin_dq(Sums& sums, Operands<A, B> const& of) {
    begin_product<typename L::MmaQueries, LongSteps>(sums, cute::GMMA::ScaleOut::Zero, of.a, of.b);
  }
};

}  // namespace flashcute::sm90
