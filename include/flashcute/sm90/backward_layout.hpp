// From a configuration of the backward to CuTe types: the layout of shared memory, and how two warpgroups multiply.
//
// The scores of a tile are transposed: rows are keys, of which each warpgroup owns 64, and columns are queries. So P^T
// and dS^T, which the warpgroup has in registers, are left operands of the products for dV and dK. Only dS goes through
// shared memory, for dQ = dS K: that is summed over the keys of both warpgroups, and each computes a half of it.
#pragma once

#include "flashcute/sm90/passing_queries.hpp"

namespace flashcute::sm90 {

template <BackwardConfig C>
struct BackwardLayout : WarpgroupFragment {
  using Element = typename TensorCore<C.dtype>::Element;
  using BlockM = cute::Int<C.block_m>;  // queries
  using BlockN = cute::Int<C.block_n>;  // keys
  using HeadDim = cute::Int<C.head_dim>;
  using Keys = cute::Int<warpgroup_rows>;  // of a warpgroup

  /// How a block is flagged. Words stay where they are read to; of bytes ptxas makes uniform registers at once, and the
  /// block's first product waits for that. (Deterministic tiles were 1 to 2 % slower with words.)
  using Flag = std_::conditional_t<C.deterministic, bool, int32_t>;

  static constexpr int warpgroups = C.num_warps / 4;
  static_assert(warpgroups * warpgroup_rows == C.block_n);
  static constexpr int page = 64;  // columns: 128 bytes
  static_assert(page_bytes(C.head_dim * sizeof(Element)) == page * sizeof(Element));
  static constexpr int queries = C.block_m, keys = C.block_n;  // of a block that passes, and of the tile
  static constexpr int q_elements = queries * C.head_dim, dout_elements = q_elements;
  static constexpr int k_elements = keys * C.head_dim, v_elements = k_elements;
  static constexpr bool inspects_keys = true;
  static constexpr int ds_elements = C.block_m * C.block_n;
  static constexpr int k_places = C.k_stages, ds_places = 2;

  // A warpgroup's half of dQ: half of the columns of 64 queries, or all columns of half of 128.
  static constexpr bool dq_by_rows = C.block_m == 2 * warpgroup_rows;
  static_assert(dq_by_rows || C.block_m == warpgroup_rows);
  static constexpr int dq_columns = dq_by_rows ? C.head_dim : C.head_dim / warpgroups;
  using DqColumns = cute::Int<dq_columns>;
  static constexpr int dq_floats = C.block_m * C.head_dim / warpgroups;
  static constexpr int dq_parts = dq_by_rows ? 1 : 4;  // measured: with 4 d 64, causal, is 1 % slower

  // ---- operands of products, 16 of what is summed over in each step, as in ForwardLayout ----
  // Of each: one step, then the steps, then the places of the ring.
  template <class Shape, class Stride>
  using Operand = SwizzledOperand<page * sizeof(Element), Shape, Stride>;
  using Page = cute::Int<page>;
  template <int Rows>
  using StrideOfPages = cute::Int<Rows * page>;
  using StepsOfPages = cute::Shape<cute::Int<page / 16>, cute::Int<C.head_dim / page>>;

  /// 64 keys of K or V: (MMA, 1, MMA_D)
  using OperandKeys =
      Operand<cute::Shape<cute::Shape<Keys, cute::_16>, cute::_1, StepsOfPages>,
              cute::Stride<cute::Stride<Page, cute::_1>, cute::_0, cute::Stride<cute::_16, StrideOfPages<C.block_n>>>>;
  /// The ring of Q or dO as rows: (MMA, 1, MMA_D, PLACE)
  template <int Places>
  using OperandQueries =
      Operand<cute::Shape<cute::Shape<BlockM, cute::_16>, cute::_1, StepsOfPages, cute::Int<Places>>,
              cute::Stride<cute::Stride<Page, cute::_1>, cute::_0, cute::Stride<cute::_16, StrideOfPages<C.block_m>>,
                           cute::Int<q_elements>>>;
  /// The same as columns, whose rows are summed over: (MMA, 1, MMA_M, PLACE)
  template <int Places>
  using OperandQueryColumns =
      Operand<cute::Shape<cute::Shape<cute::Shape<Page, cute::Int<C.head_dim / page>>, cute::_16>, cute::_1,
                          cute::Int<C.block_m / 16>, cute::Int<Places>>,
              cute::Stride<cute::Stride<cute::Stride<cute::_1, StrideOfPages<C.block_m>>, Page>, cute::_0,
                           cute::Int<16 * page>, cute::Int<q_elements>>>;
  /// 64 queries of dS, a page for the keys of each warpgroup: (MMA, 1, MMA_N, PLACE)
  using OperandDs = Operand<cute::Shape<cute::Shape<Keys, cute::_16>, cute::_1,
                                        cute::Shape<cute::Int<page / 16>, cute::Int<warpgroups>>, cute::Int<ds_places>>,
                            cute::Stride<cute::Stride<Page, cute::_1>, cute::_0,
                                         cute::Stride<cute::_16, StrideOfPages<C.block_m>>, cute::Int<ds_elements>>>;
  /// The columns of K that a warpgroup's half of dQ has: (MMA, 1, MMA_N)
  using OperandKeyColumns = Operand<cute::Shape<cute::Shape<cute::Shape<Page, cute::Int<dq_columns / page>>, cute::_16>,
                                                cute::_1, cute::Int<C.block_n / 16>>,
                                    cute::Stride<cute::Stride<cute::Stride<cute::_1, StrideOfPages<C.block_n>>, Page>,
                                                 cute::_0, cute::Int<16 * page>>>;

  // ---- products ----
  /// S^T = K Q^T and dP^T = V dO^T
  using MmaScores = cute::MMA_Traits<
      decltype(cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<Keys, BlockM, cute::_16>>())>;
  /// dV += P^T dO and dK += dS^T Q
  using MmaKeys = cute::MMA_Traits<
      decltype(cute::GMMA::rs_op_selector<Element, Element, float, cute::Shape<Keys, HeadDim, cute::_16>,
                                          cute::GMMA::Major::K, cute::GMMA::Major::MN>())>;
  /// dQ = dS K
  using MmaQueries = cute::MMA_Traits<
      decltype(cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<Keys, DqColumns, cute::_16>,
                                          cute::GMMA::Major::K, cute::GMMA::Major::MN>())>;

  // ---- shared memory ----
  struct SharedStorage {
    alignas(1024) Element k[k_places][k_elements];
    alignas(1024) Element v[k_elements];
    alignas(1024) Element q[C.stages][q_elements];
    alignas(1024) Element dout[C.dout_stages][q_elements];
    alignas(1024) Element ds[ds_places][ds_elements];
    alignas(128) float dq[warpgroups][dq_floats];  // in the order in which threads hold it
    alignas(16) float lse[C.stages][C.block_m];    // to base 2
    alignas(16) float delta[C.dout_stages][C.block_m];
    AnnouncedQueries<Flag> blocks[C.stages];
    Barrier k_full[k_places], k_empty[k_places], v_empty;
    Barrier q_full[C.stages], q_empty[C.stages];
    Barrier dout_full[C.dout_stages], dout_empty[C.dout_stages];
    Barrier ds_full[ds_places], ds_empty[ds_places];
    Barrier dq_full[warpgroups], dq_empty[warpgroups];
    Barrier q_landed[C.stages], dout_landed[C.dout_stages];  // arrived, its inspection may begin
    Barrier k_inspected[k_places];
  };
  static_assert(sizeof(SharedStorage) <= sm90_smem_bytes(C));

  /// `inspected`: whether a warp inspects what is loaded.
  FLASHCUTE_DEVICE static void init(SharedStorage& smem, bool inspected) {
    for (int i = 0; i < k_places; ++i) {
      barrier_init(smem.k_full[i], 1);
      barrier_init(smem.k_empty[i], 2 * warpgroups + (inspected ? 1 : 0));  // with the warps that add
      barrier_init(smem.k_inspected[i], 1);
    }
    barrier_init(smem.v_empty, warpgroups);
    for (int i = 0; i < C.stages; ++i) {
      barrier_init(smem.q_full[i], 1);
      barrier_init(smem.q_landed[i], 1);
      barrier_init(smem.q_empty[i], warpgroups);
    }
    for (int i = 0; i < C.dout_stages; ++i) {
      barrier_init(smem.dout_full[i], 1);
      barrier_init(smem.dout_landed[i], 1);
      barrier_init(smem.dout_empty[i], warpgroups);
    }
    for (int i = 0; i < ds_places; ++i) {
      barrier_init(smem.ds_full[i], warpgroups);
      barrier_init(smem.ds_empty[i], warpgroups);
    }
    for (int w = 0; w < warpgroups; ++w) {
      barrier_init(smem.dq_full[w], 1);
      barrier_init(smem.dq_empty[w], 1);
    }
  }
};

}  // namespace flashcute::sm90
