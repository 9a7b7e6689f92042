// fp32 products by tensor cores that keep 11 bits of an operand: a number is the sum of two of those, up to 2^-21 of
// it, and a product the sum of three of theirs ("3xTF32"); the fourth is too small to matter. Source: Ootomo and
// Yokota, "Recovering single precision accuracy from Tensor Cores", arXiv 2203.03341.
#pragma once

#include "flashcute/gemm.hpp"

namespace flashcute {

/// A fragment of numbers that are each high + low. Of infinity `low` is NaN.
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

template <ForwardConfig C>
struct Products<C, Math::tf32x3> {
  using L = ForwardLayout<C>;
  using TensorCores = Products<C, Math::tensor_core>;
  using Mma = typename L::TiledMma;
  using Tile = ArrivedTile<typename L::Element>;

  static constexpr bool wants_finite = true;

  /// Q or K: the operand of the tensor cores, not rounded, and where it comes from.
  template <class Fragments>
  struct Operand {
    Fragments fragments;
    Tile tile;
  };

  FLASHCUTE_DEVICE static auto query(Tile q) { return operand(TensorCores::query(q.tile), q); }
  FLASHCUTE_DEVICE static auto key(Tile k) { return operand(TensorCores::key(k.tile), k); }

  template <class Scores>
  FLASHCUTE_DEVICE static auto probabilities(Scores const& p) {
    return TensorCores::probabilities(p);
  }

  FLASHCUTE_DEVICE static auto value(Tile v) { return TensorCores::value(v.tile); }

  /// S += Q K^T.
  template <class Accumulator, class Q, class K>
  FLASHCUTE_DEVICE static void gemm(Accumulator& s, Operand<Q>& q, Operand<K>&& k) {
    split_gemm(s, q.fragments, k.fragments);
    if (!q.tile.finite || !k.tile.finite) compute_scores(s, q.tile, k.tile);
  }

  /// O += P V, V being finite.
  template <class Accumulator, class P, class V>
  FLASHCUTE_DEVICE static void gemm(Accumulator& o, P&& p, V& v) {
    split_gemm(o, p, v);
  }

 private:
  template <class Fragments>
  FLASHCUTE_DEVICE static auto operand(Fragments const& fragments, Tile tile) {
    return Operand<Fragments>{fragments, tile};
  }

  /// S = Q K^T as it is written, for operands that cannot be taken apart. Slow, and rare.
  template <class Accumulator>
  FLASHCUTE_DEVICE static void compute_scores(Accumulator& acc, Tile q, Tile k) {
    using namespace cute;
    auto s = by_row_and_column(acc);  // (row, column)
    // (Nothing of this is to be computed before the main loop.)
    int const thread = static_cast<int>(computed_here(static_cast<SharedAddress>(thread_index())));
    auto const c = by_row_and_column(L::template coordinates<C.block_n>(thread));     // -> (row, column)
    auto const sQ = make_tensor(make_smem_ptr(q.tile), typename L::SmemQ::Layout{});  // (M, D)
    auto const sK = make_tensor(make_smem_ptr(k.tile), typename L::SmemK::Layout{});  // (N, D)
    clear(acc);
    CUTE_NO_UNROLL
    for (int x = 0; x < C.head_dim; ++x) {
      CUTE_UNROLL
      for (int i = 0; i < size<0>(s); ++i) {
        float const a = shared_load<float>(&sQ(get<0>(c(i, 0)), x));
        CUTE_UNROLL
        for (int j = 0; j < size<1>(s); ++j) s(i, j) += a * shared_load<float>(&sK(get<1>(c(0, j)), x));
      }
    }
  }

  /// acc += A B^T over all K-steps, a group of columns at a time, each into sums of its own: tensor cores cut off what
  /// they add up, and over the many blocks of a long row that would be a bias. Large and small products go to sums
  /// apart, so that more of them are under way at once.
  template <class Accumulator, class A, class B>
  FLASHCUTE_DEVICE static void split_gemm(Accumulator& acc, A& a, B& b) {
    using namespace cute;
    using PairA = Tf32Pair<decltype(make_fragment_like(a.fragment(_, 0, 0)))>;
    using PairB = Tf32Pair<decltype(make_fragment_like(b.fragment(_, 0, 0)))>;
    constexpr int rows = decltype(size<1>(acc))::value;
    constexpr int columns = decltype(size<1>(b.fragment))::value;
    constexpr int group = 2;  // n8 columns of sums at once
    constexpr int k_steps = decltype(size<2>(b.fragment))::value;
    constexpr int ahead = C.mma_double_buffer ? 1 : 0;  // K-steps of a group
    auto const fetch = [&](int step) {
      if (step >= columns / group * k_steps) return;
      a.fetch(step % k_steps);
      CUTE_UNROLL
      for (int n = 0; n < group; n += 2) b.fetch(step % k_steps, (step / k_steps * group + n) / 2);
    };
    if constexpr (ahead > 0) fetch(0);
    CUTE_UNROLL
    for (int first = 0; first < columns; first += group) {
      auto large = make_tensor<float>(make_shape(shape<0>(acc), shape<1>(acc), Int<group>{}));  // (MMA, MMA_M, group)
      auto small = make_fragment_like(large);
      clear(large);
      clear(small);
      CUTE_UNROLL
      for (int k = 0; k < k_steps; ++k) {
        fetch(first / group * k_steps + k + ahead);
        PairA pair_a[rows];
        PairB pair_b[group];
        CUTE_UNROLL
        for (int m = 0; m < rows; ++m) pair_a[m].assign(a.fragment(_, m, k));
        CUTE_UNROLL
        for (int n = 0; n < group; ++n) pair_b[n].assign(b.fragment(_, first + n, k));
        for_each_part(large, [&](int m, int n) { cute::gemm(Mma{}, pair_a[m].low, pair_b[n].high, small(_, m, n)); });
        for_each_part(large, [&](int m, int n) { cute::gemm(Mma{}, pair_a[m].high, pair_b[n].high, large(_, m, n)); });
        for_each_part(large, [&](int m, int n) { cute::gemm(Mma{}, pair_a[m].high, pair_b[n].low, small(_, m, n)); });
      }
      for_each_part(large, [&](int m, int n) {
        CUTE_UNROLL
        for (int i = 0; i < size<0>(acc); ++i) acc(i, m, first + n) += large(i, m, n) + small(i, m, n);
      });
    }
  }

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

}  // namespace flashcute
