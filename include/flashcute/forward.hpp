// FlashAttention-2 forward on tensor cores (cp.async, ldmatrix, mma.sync; compute capability 8.0 and
// later). One thread block computes one tile of query rows of one head.
// Source: Dao, "FlashAttention-2", arXiv 2307.08691, algorithm 1.
#pragma once

#include "flashcute/load_store.hpp"
#include "flashcute/softmax.hpp"

namespace flashcute {

template <ForwardKernelId Id>
struct ForwardPass {
  static constexpr ForwardConfig C = Id.config;
  using L = ForwardLayout<C>;
  using Mask = flashcute::Mask<Id.features.mask>;

  FLASHCUTE_DEVICE static void run(ForwardParams const& p, typename L::SharedStorage& smem) {
    using namespace cute;
    auto const tile = QueryTile::at(p, block_index(), C.block_m);
    auto const range = Mask::kv_range(tile, p, C.block_n);
    ForwardLoader<C> loader{p, tile, range, smem};
    typename L::TiledMma mma;
    OnlineSoftmax<L::rows_per_thread> softmax{p};

    auto q = loader.query();
    auto o = partition_fragment_C(mma, Shape<typename L::BlockM, typename L::HeadDim>{});  // (MMA, MMA_M, MMA_D)
    clear(o);
    range.for_each_backward([&](int n, auto partial) {
      auto s = partition_fragment_C(mma, Shape<typename L::BlockM, typename L::BlockN>{});  // (MMA, MMA_M, MMA_N)
      clear(s);
      gemm(mma, s, q, loader.key(n, partial));  // S = Q K^T
      auto v = loader.value(n, partial);        // K(n - 1) loads while the softmax and P V compute
      if constexpr (decltype(partial)::value) apply_mask(s, tile, n, p);
      softmax.update(s, o);
      if constexpr (decltype(partial)::value && Mask::rows_differ) {
        if (!loader.value_is_finite()) extract_nonfinite(o, loader, tile, n, p);
      }
      auto const probabilities = convert<typename L::Element>(s);
      gemm(mma, o, RegisterOperand{as_operand_a(probabilities)}, v);  // O += P V
    });

    softmax.finish(o, [&](int i) { return Mask::empty_row(tile.row0 + row_of(i), p); });
    store_lse(softmax, p, tile);
    store_output<C>(o, p, tile, smem);
  }

 private:
  /// Tile row of the thread's i-th row.
  FLASHCUTE_DEVICE static int row_of(int i) {
    auto const c = coordinates<C.block_n>();
    return cute::get<0>(c(i, 0));
  }

  /// (row, column) within the tile of every accumulator element this thread holds.
  template <int Columns>
  FLASHCUTE_DEVICE static auto coordinates() {
    using namespace cute;
    auto const identity = make_identity_tensor(Shape<typename L::BlockM, Int<Columns>>{});
    return by_row_and_column(typename L::TiledMma{}.get_thread_slice(thread_index()).partition_C(identity));
  }

  /// Lets each row take what it sees of the values that are not finite, and removes these from V: what is
  /// left can be multiplied by the zeros of the rows that do not see it.
  template <class Output>
  FLASHCUTE_DEVICE static void extract_nonfinite(Output& output, ForwardLoader<C>& loader, QueryTile const& tile, int n,
                                                 ForwardParams const& p) {
    using namespace cute;
    using Test = NonFinite<typename L::Element>;
    auto o = by_row_and_column(output);        // (row, head dim)
    auto const c = coordinates<C.head_dim>();  // -> (row, column) of o
    for (int key = 0; key < C.block_n; ++key) {
      CUTE_UNROLL
      for (int j = 0; j < size<1>(o); ++j) {
        uint32_t const bits = loader.value_bits(key, get<1>(c(0, j)));
        if (!Test::in_low_half(bits)) continue;
        CUTE_UNROLL
        for (int i = 0; i < size<0>(o); ++i) {
          if (Mask::visible(tile.row0 + row_of(i), n * C.block_n + key, p)) o(i, j) += Test::value(bits);
        }
      }
    }
    loader.drop_nonfinite_values();
  }

  /// Scores of keys that a query does not see become -inf, by selection: what they were does not matter.
  template <class Scores>
  FLASHCUTE_DEVICE static void apply_mask(Scores& scores, QueryTile const& tile, int n, ForwardParams const& p) {
    using namespace cute;
    auto s = by_row_and_column(scores);  // (row, column)
    auto const c = coordinates<C.block_n>();
    CUTE_UNROLL
    for (int i = 0; i < size<0>(s); ++i) {
      CUTE_UNROLL
      for (int j = 0; j < size<1>(s); ++j) {
        bool const visible = Mask::visible(tile.row0 + get<0>(c(i, j)), n * C.block_n + get<1>(c(i, j)), p);
        if (!visible) s(i, j) = -infinity;
      }
    }
  }

  template <class Softmax>
  FLASHCUTE_DEVICE static void store_lse(Softmax const& softmax, ForwardParams const& p, QueryTile const& tile) {
    if (p.lse == nullptr || thread_index() % 4 != 0) return;  // one lane of the quad that shares a row
    float* const lse = static_cast<float*>(p.lse) + tile.lse_offset(p);
    CUTE_UNROLL
    for (int i = 0; i < L::rows_per_thread; ++i) {
      if (row_of(i) < tile.rows) lse[row_of(i)] = softmax.lse(i);
    }
  }
};

}  // namespace flashcute
