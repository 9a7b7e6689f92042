// fp32 products by tensor cores that keep 11 significant bits of an operand ("3xTF32"): a number is the sum of two TF32
// numbers, up to 2^-21 of it, and a product the sum of three of their products; the fourth is too small to matter.
// Source: Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores", arXiv 2203.03341.
#pragma once

#include "flashcute/sm80/gemm.hpp"

namespace flashcute {

/// A fragment of numbers, each split into high + low. `low` of infinity is NaN.
template <class Fragment>
struct Tf32Pair {
  using Part = decltype(cute::make_fragment_like<cute::tfloat32_t>(Fragment{}));
  Part high, low;

  template <class Numbers>
  FLASHCUTE_DEVICE void assign(Numbers const& numbers) {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(numbers); ++i) {
      high(i) = truncate_tf32(numbers(i));
      low(i) = as_tf32(numbers(i) - static_cast<float>(high(i)));
    }
  }
};

/// Products with the operands of TensorCoreProducts, for numbers that are all finite.
template <TileConfig C, int WarpsN = 1>
struct Tf32x3Products : TensorCoreProducts<C, WarpsN> {
  using L = TileLayout<C>;
  using TensorCoreProducts<C, WarpsN>::mma;
  using Element = typename L::Element;

  static constexpr bool wants_finite = true;

  /// acc += A B^T over all K-steps.
  template <class Accumulator, class A, class B>
  FLASHCUTE_DEVICE static void gemm(Accumulator& acc, A&& a, B&& b) {
    gemm_by_columns(a, b, [&](int group, auto const& sums) {
      for_each_part(sums, [&](int m, int n) {
        CUTE_UNROLL
        for (int i = 0; i < cute::size<0>(acc); ++i) acc(i, m, 2 * group + n) += sums(i, m, n);
      });
    });
  }

  /// A B^T, 16 columns at a time, each with sums of its own that start at 0: tensor cores truncate the sums of their
  /// accumulators, which over the many blocks of a long row would be a bias. take(n, sums) gets those of this warp's
  /// n-th piece. Large and small products have separate sums, so that more instructions are independent.
  template <class A, class B, class Take>
  FLASHCUTE_DEVICE static void gemm_by_columns(A&& a, B&& b, Take const& take) {
    using namespace cute;
    using PairA = Tf32Pair<decltype(make_fragment_like(a.fragment(_, 0, 0)))>;
    using PairB = Tf32Pair<decltype(make_fragment_like(b.fragment(_, 0, 0)))>;
    constexpr int rows = decltype(size<1>(a.fragment))::value;
    constexpr int groups = decltype(size<1>(b.fragment))::value / 2;
    constexpr int k_steps = decltype(size<2>(b.fragment))::value;
    constexpr int ahead = C.mma_double_buffer ? 1 : 0;  // K-steps of a group
    auto const fetch = [&](int step) {
      if (step >= groups * k_steps) return;
      a.fetch(step % k_steps);
      b.fetch(step % k_steps, step / k_steps);
    };
    if constexpr (ahead > 0) fetch(0);
    CUTE_UNROLL
    for (int group = 0; group < groups; ++group) {
      auto large = make_tensor<float>(make_shape(_4{}, size<1>(a.fragment), _2{}));  // (MMA, MMA_M, 2)
      auto small = make_tensor<float>(large.shape());
      clear(large);
      clear(small);
      CUTE_UNROLL
      for (int k = 0; k < k_steps; ++k) {
        fetch(group * k_steps + k + ahead);
        PairA pair_a[rows];
        PairB pair_b[2];
        CUTE_UNROLL
        for (int m = 0; m < rows; ++m) pair_a[m].assign(a.fragment(_, m, k));
        CUTE_UNROLL
        for (int n = 0; n < 2; ++n) pair_b[n].assign(b.fragment(_, 2 * group + n, k));
        for_each_part(large, [&](int m, int n) { mma(small(_, m, n), pair_a[m].low, pair_b[n].high); });
        for_each_part(large, [&](int m, int n) { mma(large(_, m, n), pair_a[m].high, pair_b[n].high); });
        for_each_part(large, [&](int m, int n) { mma(small(_, m, n), pair_a[m].high, pair_b[n].low); });
      }
      CUTE_UNROLL
      for (int i = 0; i < size(large); ++i) large(i) += small(i);
      take(group, large);
    }
  }

  /// acc += A B^T of the rows of two tiles, in fp32 without a split, for tiles with NaN or infinity. Slow, but rare.
  template <class SmemA, class SmemB, class Accumulator>
  FLASHCUTE_DEVICE static void gemm_of_rows(Accumulator& acc, Element const* a, Element const* b) {
    using namespace cute;
    auto sums = by_row_and_column(acc);  // (row, column)
    // (Opaque to the compiler, which would otherwise compute these coordinates before the main loop.)
    int const thread = static_cast<int>(computed_here(static_cast<SharedAddress>(thread_index())));
    auto const c = by_row_and_column(  // -> (row, column)
        L::template coordinates<typename SmemA::TileRows, typename SmemB::TileRows, WarpsN>(thread));
    auto const sA = make_tensor(make_smem_ptr(a), typename SmemA::Layout{});  // (M, K)
    auto const sB = make_tensor(make_smem_ptr(b), typename SmemB::Layout{});  // (N, K)
    CUTE_NO_UNROLL
    for (int k = 0; k < SmemA::TileColumns::value; ++k) {
      CUTE_UNROLL
      for (int i = 0; i < size<0>(sums); ++i) {
        float const x = shared_load<float>(&sA(get<0>(c(i, 0)), k));
        CUTE_UNROLL
        for (int j = 0; j < size<1>(sums); ++j) sums(i, j) += x * shared_load<float>(&sB(get<1>(c(0, j)), k));
      }
    }
  }

 private:
  /// Calls f(m, n) for each tensor-core instruction of sums (MMA, MMA_M, MMA_N).
  template <class Sums, class F>
  FLASHCUTE_DEVICE static void for_each_part(Sums const& sums, F const& f) {
    CUTE_UNROLL
    for (int n = 0; n < cute::size<2>(sums); ++n) {
      CUTE_UNROLL
      for (int m = 0; m < cute::size<1>(sums); ++m) f(m, n);
    }
  }
};

/// Products whose columns WarpsN warps share, as C.math computes them.
template <TileConfig C, int WarpsN>
using TileProducts =
    std_::conditional_t<C.math == Math::tf32x3, Tf32x3Products<C, WarpsN>, TensorCoreProducts<C, WarpsN>>;

template <TileConfig C>
struct Products<C, Math::tf32x3> {
  using L = TileLayout<C>;
  using Tf32x3 = Tf32x3Products<C>;
  using Tile = ArrivedTile<typename L::Element>;

  static constexpr bool wants_finite = true;

  /// Q or K as an operand, with the tile that it is loaded from.
  template <class Fragments>
  struct Operand {
    Fragments fragments;
    Tile tile;
  };

  FLASHCUTE_DEVICE static auto query(Tile q) { return operand(Tf32x3::query(q.tile), q); }
  FLASHCUTE_DEVICE static auto key(Tile k) { return operand(Tf32x3::key(k.tile), k); }

  template <class Scores>
  FLASHCUTE_DEVICE static auto probabilities(Scores const& p) {
    return Tf32x3::probabilities(p);
  }

  FLASHCUTE_DEVICE static auto value(Tile v) { return Tf32x3::value(v.tile); }

  /// S = Q K^T; S is 0 before.
  template <class Accumulator, class Q, class K>
  FLASHCUTE_DEVICE static void gemm(Accumulator& s, Operand<Q>& q, Operand<K>&& k) {
    Tf32x3::gemm(s, q.fragments, k.fragments);
    if (q.tile.finite && k.tile.finite) return;
    clear(s);
    Tf32x3::template gemm_of_rows<typename L::SmemQ, typename L::SmemK>(s, q.tile, k.tile);
  }

  /// O += P V; V is finite.
  template <class Accumulator, class P, class V>
  FLASHCUTE_DEVICE static void gemm(Accumulator& o, P&& p, V& v) {
    Tf32x3::gemm(o, p, v);
  }

 private:
  template <class Fragments>
  FLASHCUTE_DEVICE static auto operand(Fragments const& fragments, Tile tile) {
    return Operand<Fragments>{fragments, tile};
  }
};

}  // namespace flashcute
