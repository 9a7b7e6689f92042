// The backward pass on tensor cores, in two launches: tiles of queries give delta and dQ, tiles of keys then dK and dV.
// Each recomputes P from the LSE. Every element of a gradient is summed by one thread block in one order, so the result
// has the same bits in every run.
//
//     P = exp(scale Q K^T - LSE)     dS = P * (dO V^T - delta)     delta = rowsum(dO * O) - dLSE
//     dQ = scale dS K                dK = scale dS^T Q             dV = P^T dO
//
// The passes mirror each other. A tile's rows of X (Q or K) and Y (dO or V) stay in shared memory; blocks of the other
// side, B_X (K or Q) and B_Y (V or dO), pass by: S = X B_X^T, dP = Y B_Y^T, dX += dS B_X, dY += P B_Y. P and dS go from
// product to product in registers.
// Source: Dao, "FlashAttention-2", arXiv 2307.08691, algorithm 2, with its loops exchanged for dQ.
#pragma once

#include "flashcute/backward_config.hpp"
#include "flashcute/backward_params.hpp"
#include "flashcute/load_store.hpp"

namespace flashcute {

/// C: the tile, of which it takes dtype, head_dim, head_dim_v, block_m rows that stay, block_n rows that pass by, the
/// warps and how it copies.
template <ForwardConfig C, BackwardPass Pass, MaskKind Kind>
struct BackwardKernel {
  using L = ForwardLayout<C>;
  using P = Products<C>;
  using Mask = flashcute::Mask<Kind>;
  using Element = typename L::Element;
  using SmemX = typename L::SmemQ;
  using SmemY = typename L::SmemO;
  using SmemBlockX = typename L::SmemK;
  using SmemBlockY = typename L::SmemV;
  static constexpr bool keys_stay = Pass == BackwardPass::keys;
  /// Queries are the rows of a score tile if they stay, else its columns.
  static constexpr int queries = keys_stay ? C.block_n : C.block_m;

  template <class Columns>
  using Accumulator = decltype(L::template accumulator<Columns>());

  struct SharedStorage {
    alignas(128) Element x[C.block_m * C.head_dim];
    alignas(128) Element y[C.block_m * C.head_dim_v];
    alignas(128) Element block_x[C.block_n * C.head_dim];
    alignas(128) Element block_y[C.block_n * C.head_dim_v];
    alignas(16) float lse[queries];  // in units of log2
    alignas(16) float delta[queries];
  };

  static_assert(C.math == Math::tensor_core, "the backward multiplies on tensor cores");
  static_assert(sizeof(SharedStorage) <= max_smem_bytes(compiled_arch), "more shared memory than a thread block has");

  FLASHCUTE_DEVICE static void run(BackwardParams const& p, SharedStorage& smem) {
    if constexpr (keys_stay) {
      run_keys(p, smem);
    } else {
      run_queries(p, smem);
    }
  }

 private:
  using Rows = flashcute::Rows<Element>;

  /// delta and dQ.
  FLASHCUTE_DEVICE static void run_queries(BackwardParams const& p, SharedStorage& smem) {
    ForwardParams const& f = p.forward;
    auto const tile = QueryTile::at(f, block_index(), C.block_m);
    auto const q = Rows::of(f.q, f.q_stride, tile.batch, tile.head);
    auto const dout = Rows::of(p.dout, p.dout_stride, tile.batch, tile.head);
    auto const k = Rows::of(f.k, f.k_stride, tile.batch, tile.kv_head);
    auto const v = Rows::of(f.v, f.v_stride, tile.batch, tile.kv_head);
    load<SmemX>(q, tile.row0, tile.rows, f.head_dim, smem.x);
    load<SmemY>(dout, tile.row0, tile.rows, f.head_dim_v, smem.y);
    compute_delta(p, tile, smem);

    BackwardKernel pass{p, smem, tile.row0};
    auto const range = Mask::kv_range(tile, f, C.block_n);
    range.for_each_backward([&](int n, auto partial) {
      pass.load_block(k, v, n * C.block_n, f.seqlen_k);
      pass.compute_block(n * C.block_n, partial);
    });
    pass.stage_results();
    auto const partial_keys = RowRange{range.full_end * C.block_n, min_of(range.end * C.block_n, f.seqlen_k)};
    pass.template add_dropped<SmemX>(k, partial_keys, tile.rows, f.head_dim, smem.x);
    block_sync();  // all elements are corrected
    store<SmemX>(smem.x, p.dq, p.dq_stride, tile.batch, tile.head, tile.row0, tile.rows, f.head_dim);
  }

  /// dK and dV, summed over the query heads of the group.
  FLASHCUTE_DEVICE static void run_keys(BackwardParams const& p, SharedStorage& smem) {
    ForwardParams const& f = p.forward;
    auto const tile = KeyTile::at(f, block_index(), C.block_m);
    load<SmemX>(Rows::of(f.k, f.k_stride, tile.batch, tile.kv_head), tile.row0, tile.rows, f.head_dim, smem.x);
    load<SmemY>(Rows::of(f.v, f.v_stride, tile.batch, tile.kv_head), tile.row0, tile.rows, f.head_dim_v, smem.y);

    BackwardKernel pass{p, smem, tile.row0};
    auto const range = Mask::query_range(tile.row0, tile.rows, f, C.block_n);
    auto const partial_queries = RowRange{range.begin * C.block_n, min_of(range.full_begin * C.block_n, f.seqlen_q)};
    int const group = f.heads / f.kv_heads;
    auto const for_each_head = [&](auto const& body) {
      for (int head = tile.kv_head * group; head < (tile.kv_head + 1) * group; ++head) {
        body(head, Rows::of(f.q, f.q_stride, tile.batch, head), Rows::of(p.dout, p.dout_stride, tile.batch, head));
      }
    };
    for_each_head([&](int head, Rows const& q, Rows const& dout) {
      range.for_each([&](int m, auto partial) {
        pass.load_block(q, dout, m * C.block_n, f.seqlen_q);
        load_per_query(p, tile.batch, head, m * C.block_n, smem);
        pass.compute_block(m * C.block_n, partial);
      });
    });
    pass.stage_results();
    for_each_head([&](int, Rows const& q, Rows const& dout) {
      pass.template add_dropped<SmemX>(q, partial_queries, tile.rows, f.head_dim, smem.x);
      pass.template add_dropped<SmemY>(dout, partial_queries, tile.rows, f.head_dim_v, smem.y);
    });
    block_sync();  // all elements are corrected
    store<SmemX>(smem.x, p.dk, p.dk_stride, tile.batch, tile.kv_head, tile.row0, tile.rows, f.head_dim);
    store<SmemY>(smem.y, p.dv, p.dv_stride, tile.batch, tile.kv_head, tile.row0, tile.rows, f.head_dim_v);
  }

  // ---- a block ---------------------------------------------------------------------------------------

  FLASHCUTE_DEVICE BackwardKernel(BackwardParams const& p, SharedStorage& smem, int row0)
      : p_(p), smem_(smem), row0_(row0) {}

  /// Starts loading the rows of a block that exist; the others become zeros, which add nothing.
  FLASHCUTE_DEVICE void load_block(Rows const& x, Rows const& y, int row0, int seqlen) const {
    block_sync();  // all warps have finished reading the block before
    load<SmemBlockX>(x, row0, seqlen - row0, p_.forward.head_dim, smem_.block_x);
    load<SmemBlockY>(y, row0, seqlen - row0, p_.forward.head_dim_v, smem_.block_y);
  }

  /// dX and dY of the block whose first row is `block_row0`.
  template <class Partial>
  FLASHCUTE_DEVICE void compute_block(int block_row0, Partial) {
    copies_wait();
    block_sync();  // the block has arrived, what there is of each query too; at first also X and Y
    auto s = L::template accumulator<typename L::BlockN>();   // (MMA, MMA_M, MMA_N)
    auto dp = L::template accumulator<typename L::BlockN>();  // (MMA, MMA_M, MMA_N)
    P::gemm(s, P::template rows_as_a<SmemX>(smem_.x), P::template rows_as_b<SmemBlockX>(smem_.block_x));
    P::gemm(dp, P::template rows_as_a<SmemY>(smem_.y), P::template rows_as_b<SmemBlockY>(smem_.block_y));
    to_probabilities<Partial::value>(s, dp, block_row0);
    if constexpr (Partial::value && Mask::rows_differ) drop_nonfinite();
    if constexpr (keys_stay) P::gemm(dy_, P::probabilities(s), P::template columns_as_b<SmemBlockY>(smem_.block_y));
    P::gemm(dx_, P::probabilities(dp), P::template columns_as_b<SmemBlockX>(smem_.block_x));
  }

  /// From S and dP, in place, P and dS. What is not visible becomes 0 by selection: it may be NaN. P is at most 1:
  /// where scores are so large that rounding says otherwise, it is held there.
  template <bool Partial, class Scores>
  FLASHCUTE_DEVICE void to_probabilities(Scores& scores, Scores& score_gradients, int block_row0) const {
    using namespace cute;
    ForwardParams const& f = p_.forward;
    auto s = by_row_and_column(scores);                                                    // (row, column)
    auto ds = by_row_and_column(score_gradients);                                          // (row, column)
    auto const c = by_row_and_column(L::template coordinates<C.block_n>(thread_index()));  // -> (row, column)
    // Rows of zeros stand where there is no query. Their scores are NaN at a key that is infinite.
    bool const has_end = keys_stay && block_row0 + C.block_n > f.seqlen_q;
    CUTE_UNROLL
    for (int j = 0; j < size<1>(s); ++j) {
      CUTE_UNROLL
      for (int i = 0; i < size<0>(s); ++i) {
        int const row = get<0>(c(i, 0)), column = get<1>(c(0, j));
        int const query = keys_stay ? column : row;
        float const x = s(i, j) * f.scale_log2 - shared_load<float>(&smem_.lse[query]);
        float const p = exp2_approx(x > 0.f ? 0.f : x);
        bool const seen = !Partial || (keys_stay ? Mask::visible(block_row0 + column, row0_ + row, f)
                                                 : Mask::visible(row0_ + row, block_row0 + column, f));
        bool const counts = seen && (!has_end || block_row0 + column < f.seqlen_q);
        s(i, j) = counts ? p : 0.f;
        ds(i, j) = counts ? p * (ds(i, j) - shared_load<float>(&smem_.delta[query])) : 0.f;
      }
    }
  }

  /// Takes NaN and infinity out of what the next products multiply by 0 for rows that do not see it.
  FLASHCUTE_DEVICE void drop_nonfinite() {
    drop_nonfinite(smem_.block_x, C.block_n * C.head_dim);
    if constexpr (keys_stay) drop_nonfinite(smem_.block_y, C.block_n * C.head_dim_v);
  }

  FLASHCUTE_DEVICE void drop_nonfinite(Element* block, int count) {
    if (block_all_finite<L::threads>(block, count)) return;  // all warps have finished S and dP
    dropped_ = true;
    zero_nonfinite<L::threads>(block, count);
    block_sync();  // the whole block is finite
  }

  // ---- what there is of each query -------------------------------------------------------------------

  /// delta of the tile's rows, to shared and to global memory; their LSE to shared memory.
  FLASHCUTE_DEVICE static void compute_delta(BackwardParams const& p, QueryTile const& tile, SharedStorage& smem) {
    ForwardParams const& f = p.forward;
    auto const out = Rows::of(f.out, f.out_stride, tile.batch, tile.head);
    auto const dout = Rows::of(p.dout, p.dout_stride, tile.batch, tile.head);
    int const lane = thread_index() % 32;
    for (int row = thread_index() / 32; row < C.block_m; row += C.num_warps) {
      float sum = 0;
      if (row < tile.rows) {
        for (int c = lane; c < f.head_dim_v; c += 32) {
          sum += static_cast<float>(out.at(tile.row0 + row, c)) * static_cast<float>(dout.at(tile.row0 + row, c));
        }
      }
      for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
      if (lane != 0) continue;
      float lse = 0;
      if (row < tile.rows) {
        if (p.dlse != nullptr) {
          sum -= global_load<float>(static_cast<float const*>(p.dlse) +
                                    row_offset(p.dlse_stride, tile.batch, tile.head, tile.row0 + row));
        }
        lse = global_load<float>(static_cast<float const*>(f.lse) + tile.lse_offset(f) + row);
        global_store(static_cast<float*>(p.delta) + tile.lse_offset(f) + row, sum);
      }
      shared_store(&smem.delta[row], sum);
      shared_store(&smem.lse[row], lse * log2_e);
    }
  }

  /// LSE and delta of a block's rows; 0 where there is no row.
  FLASHCUTE_DEVICE static void load_per_query(BackwardParams const& p, int batch, int head, int row0,
                                              SharedStorage& smem) {
    ForwardParams const& f = p.forward;
    int64_t const first = (static_cast<int64_t>(batch) * f.heads + head) * f.seqlen_q + row0;
    for (int i = thread_index(); i < C.block_n; i += L::threads) {
      bool const exists = row0 + i < f.seqlen_q;
      float const lse = exists ? global_load<float>(static_cast<float const*>(f.lse) + first + i) : 0.f;
      float const delta = exists ? global_load<float>(static_cast<float const*>(p.delta) + first + i) : 0.f;
      shared_store(&smem.lse[i], lse * log2_e);
      shared_store(&smem.delta[i], delta);
    }
  }

  // ---- results ---------------------------------------------------------------------------------------

  /// dX and dY to shared memory, in the places of X and Y.
  FLASHCUTE_DEVICE void stage_results() {
    auto const scale = static_cast<float>(p_.forward.scale);
    CUTE_UNROLL
    for (int i = 0; i < cute::size(dx_); ++i) dx_(i) *= scale;
    copies_wait();
    block_sync();  // all warps have finished reading X and Y, and no copy is under way
    stage_tile<C, SmemX>(dx_, smem_.x);
    if constexpr (keys_stay) stage_tile<C, SmemY>(dy_, smem_.y);
    block_sync();  // the tiles are in shared memory
  }

  template <class Smem>
  FLASHCUTE_DEVICE void add_dropped(Rows const& from, RowRange const& others, int rows, int width,
                                    Element* tile) const {
    if (!Mask::rows_differ || !dropped_) return;
    flashcute::add_dropped<C, Smem>(from, others, rows, width, tile, [&](int row, int other) {
      return keys_stay ? Mask::visible(other, row0_ + row, p_.forward) : Mask::visible(row0_ + row, other, p_.forward);
    });
  }

  // ---- from and to the tensors -----------------------------------------------------------------------

  template <class Smem>
  FLASHCUTE_DEVICE static void load(Rows const& from, int row0, int rows, int columns, Element* tile) {
    using Copy = TileCopy<C, Smem>;
    Copy::load(Copy::first(from.first + row0 * from.stride, from.stride), from.stride, rows, columns, tile,
               std_::true_type{});
  }

  template <class Smem>
  FLASHCUTE_DEVICE static void store(Element* tile, void* base, Strides const& stride, int batch, int head, int row0,
                                     int rows, int columns) {
    using Copy = TileCopy<C, Smem>;
    auto* const to = Copy::first(static_cast<Element*>(base) + row_offset(stride, batch, head, row0), stride.row);
    Copy::store(tile, to, stride.row, rows, columns);
  }

  static constexpr float log2_e = 1.442695040888963407f;

  BackwardParams const& p_;
  SharedStorage& smem_;
  int const row0_;                                                                          // of the tile
  Accumulator<typename L::HeadDim> dx_ = L::template accumulator<typename L::HeadDim>();    // (MMA, MMA_M, MMA_D)
  Accumulator<typename L::HeadDimV> dy_ = L::template accumulator<typename L::HeadDimV>();  // only if keys stay
  bool dropped_ = false;  // whether anything was taken out; the same in all threads of the block
};

}  // namespace flashcute
