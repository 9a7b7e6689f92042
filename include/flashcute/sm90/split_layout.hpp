// Hopper's gradients of wide heads, in two passes: `queries` computes dQ, `keys` dK and dV. Both cut all tensors into
// tiles of 64 rows. A warpgroup multiplies 64 rows of a thread block's own with 64 rows that pass by, to scores, and
// those with all columns of the rows that pass by, to the sums that are its results.
#pragma once

#include "flashcute/sm90/passing_queries.hpp"
#include "flashcute/sm90/product.hpp"

namespace flashcute::sm90 {

template <BackwardConfig C>
struct SplitLayout : WarpgroupFragment {
  using Element = typename TensorCore<C.dtype>::Element;
  static constexpr int tile_rows = warpgroup_rows;
  static constexpr int page = 64;  // columns: 128 bytes
  using BlockN = cute::Int<tile_rows>;
  template <int Columns>
  static constexpr int tile_elements = tile_rows * Columns;

  // ---- operands of products in a ring of `Places` tiles, 16 of what is summed over in each step ----
  template <class Shape, class Stride>
  using Operand = SwizzledOperand<page * sizeof(Element), Shape, Stride>;
  using Rows = cute::Int<tile_rows>;
  using Page = cute::Int<page>;
  using StrideOfPages = cute::Int<tile_rows * page>;
  /// Rows, whose columns are summed over: (MMA, 1, MMA_D, PLACE)
  template <int Columns, int Places>
  using OperandRows =
      Operand<cute::Shape<cute::Shape<Rows, cute::_16>, cute::_1,
                          cute::Shape<cute::Int<page / 16>, cute::Int<Columns / page>>, cute::Int<Places>>,
              cute::Stride<cute::Stride<Page, cute::_1>, cute::_0, cute::Stride<cute::_16, StrideOfPages>,
                           cute::Int<tile_elements<Columns>>>>;
  /// Columns, whose rows are summed over: (MMA, 1, MMA_ROWS, PLACE)
  template <int Columns, int Places>
  using OperandColumns = Operand<cute::Shape<cute::Shape<cute::Shape<Page, cute::Int<Columns / page>>, cute::_16>,
                                             cute::_1, cute::Int<tile_rows / 16>, cute::Int<Places>>,
                                 cute::Stride<cute::Stride<cute::Stride<cute::_1, StrideOfPages>, Page>, cute::_0,
                                              cute::Int<16 * page>, cute::Int<tile_elements<Columns>>>>;

  // ---- products ----
  using MmaScores = cute::MMA_Traits<
      decltype(cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<Rows, Rows, cute::_16>>())>;
  template <int Columns>
  using MmaSums = cute::MMA_Traits<
      decltype(cute::GMMA::rs_op_selector<Element, Element, float, cute::Shape<Rows, cute::Int<Columns>, cute::_16>,
                                          cute::GMMA::Major::K, cute::GMMA::Major::MN>())>;

  using Scores = decltype(WarpgroupFragment::accumulator<Rows>());
  template <int Columns>
  using Sums = decltype(WarpgroupFragment::accumulator<cute::Int<Columns>>());
  /// Rounded scores: the left operand of the sums.
  using Weights = decltype(convert<Element>(Scores{}));
};

/// The products, begun here, waited for by finish_products.
template <BackwardConfig C>
struct SplitProducts {
  using L = SplitLayout<C>;
  using Element = typename L::Element;

  /// Begins scores = own other^T, of tiles of `Columns` columns.
  template <int Columns, int Places>
  FLASHCUTE_DEVICE static void begin_scores(typename L::Scores& scores, Element* own, InRing<Element> other) {
    using Mma = typename L::MmaScores;
    auto a = described<typename Mma::FrgTypeA, typename L::template OperandRows<Columns, 1>>(own);
    auto const b = described<typename Mma::FrgTypeB, typename L::template OperandRows<Columns, Places>>(other.ring);
    // As in the forward: otherwise descriptors of so many steps stay in registers across the loop.
    described_anew(a);
    begin_product<Mma>(scores, cute::GMMA::ScaleOut::Zero, in_place(a, 0), in_place(b, other.place));
  }

  /// Begins sums += weights other, or sums = weights other if `fresh`. The weights must not change until it is done.
  template <int Columns, int Places>
  FLASHCUTE_DEVICE static void begin_sums(typename L::template Sums<Columns>& sums, typename L::Weights& weights,
                                          InRing<Element> other, bool fresh = false) {
    using Mma = typename L::template MmaSums<Columns>;
    auto const b = described<typename Mma::FrgTypeB, typename L::template OperandColumns<Columns, Places>>(other.ring);
    keep_in_place(weights);
    begin_product<Mma>(sums, fresh ? cute::GMMA::ScaleOut::Zero : cute::GMMA::ScaleOut::One,
                       as_operand_a<Element>(weights), in_place(b, other.place));
  }
};

}  // namespace flashcute::sm90
