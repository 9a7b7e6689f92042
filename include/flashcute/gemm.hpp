// Matrix products by the tensor cores. An operand is register fragments plus where they are filled from; the
// product fetches the fragments it needs next while the tensor cores work on these.
#pragma once

#include "flashcute/fragment.hpp"

namespace flashcute {

/// The two products of attention as C.math computes them: operands for S = Q K^T and O += P V, and `gemm`.
template <ForwardConfig C, Math = C.math>
struct Products;

/// TF32 keeps 10 bits of fraction. What comes from memory has 23: rounds it, where the tensor cores would
/// cut it off.
template <class Fragment>
FLASHCUTE_DEVICE void round_operand(Fragment&& fragment) {
  if constexpr (std_::is_same_v<typename std_::remove_reference_t<Fragment>::value_type, cute::tfloat32_t>) {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(fragment); ++i) fragment(i) = round_tf32(static_cast<float>(fragment(i)));
  }
}

/// Fragments that ldmatrix fills from a tile in shared memory.
template <class Fragment, class TiledCopy, class Source, class DestinationLayout>
struct SharedOperand {
  Fragment fragment;  // (MMA, MMA_M or MMA_N, MMA_K)
  TiledCopy copy;
  Source source;                  // (COPY, COPY_M or COPY_N, MMA_K) in shared memory
  DestinationLayout destination;  // the fragment as the copy partitions it

  /// All rows of K-step k.
  FLASHCUTE_DEVICE void fetch(int k) {
    CUTE_UNROLL
    for (int i = 0; i < cute::size<1>(source); ++i) fetch(k, i);
  }

  /// Rows [16 i, 16 i + 16) of K-step k (of A: i-th rows of every warp).
  FLASHCUTE_DEVICE void fetch(int k, int i) {
    auto to = cute::make_tensor(fragment.data(), destination);
    cute::copy(copy, source(cute::_, i, k), to(cute::_, i, k));
    round_operand(to(cute::_, i, k));
  }
};

template <class Fragment, class TiledCopy, class Tile>
FLASHCUTE_DEVICE auto shared_operand(Fragment const& fragment, TiledCopy const& copy, Tile const& tile) {
  auto const slice = copy.get_thread_slice(thread_index());
  auto const source = slice.partition_S(tile);
  auto const destination = slice.retile_D(fragment).layout();
  return SharedOperand<Fragment, TiledCopy, decltype(source), decltype(destination)>{fragment, copy, source,
                                                                                     destination};
}

/// Fragments of V in TF32. ldmatrix transposes 16-bit elements only, so each lane loads what it needs; the
/// keys of a K-step are numbered as `as_operand_a` numbers them.
template <class Fragment, class Tile>
struct GatheredOperand {
  Fragment fragment;  // (MMA, MMA_N, MMA_K)
  Tile tile;          // V in shared memory (N, DV)

  FLASHCUTE_DEVICE void fetch(int k, int i) {
    int const lane = thread_index() % 32;
    CUTE_UNROLL
    for (int n = 2 * i; n < 2 * i + 2; ++n) {
      CUTE_UNROLL
      for (int half = 0; half < 2; ++half) {
        float const x = shared_load<float>(&tile(8 * k + lane % 4 * 2 + half, 8 * n + lane / 4));
        fragment(half, n, k) = round_tf32(x);
      }
    }
  }
};

/// Fragments that are already in registers (or a view of them).
template <class Fragment>
struct RegisterOperand {
  Fragment fragment;  // (MMA, MMA_M or MMA_N, MMA_K)

  FLASHCUTE_DEVICE void fetch(int) const {}
};

template <ForwardConfig C>
struct Products<C, Math::tensor_core> {
  using L = ForwardLayout<C>;
  using Mma = typename L::TiledMma;

  /// Q as the A operand of S = Q K^T.
  template <class Tile>
  FLASHCUTE_DEVICE static auto query(Tile const& sQ) {  // (M, D)
    auto const tile = cute::recast<typename L::Operand>(sQ);
    auto const tSrQ = Mma{}.get_thread_slice(thread_index()).partition_fragment_A(tile);  // (MMA, MMA_M, MMA_D)
    return shared_operand(tSrQ, cute::make_tiled_copy_A(typename L::LdmatrixAtom{}, Mma{}), tile);
  }

  /// The same with all of it fetched, once and for all.
  template <class Tile>
  FLASHCUTE_DEVICE static auto held_query(Tile const& sQ) {
    auto q = query(sQ);
    CUTE_UNROLL
    for (int k = 0; k < cute::size<2>(q.fragment); ++k) q.fetch(k);
    return RegisterOperand<decltype(q.fragment)>{q.fragment};
  }

  /// K as the B operand of S = Q K^T.
  template <class Tile>
  FLASHCUTE_DEVICE static auto key(Tile const& sK) {  // (N, D)
    return operand_b<typename L::LdmatrixAtom>(cute::recast<typename L::Operand>(sK), sK.shape());
  }

  /// P as the A operand of O += P V.
  template <class Scores>
  FLASHCUTE_DEVICE static auto probabilities(Scores const& p) {  // (MMA, MMA_M, MMA_N)
    auto rounded = convert<typename L::Operand>(as_operand_a<typename L::Operand>(p));
    return RegisterOperand<decltype(rounded)>{rounded};
  }

  /// V as the B operand of O += P V.
  template <class Tile>
  FLASHCUTE_DEVICE static auto value(Tile const& sV) {  // (N, DV)
    using namespace cute;
    if constexpr (sizeof(typename L::Element) == 2) {
      auto const sVt = make_tensor(sV.data(), typename L::SmemVt{});  // (DV, N)
      return operand_b<typename L::LdmatrixTransposedAtom>(sVt, sVt.shape());
    } else {
      auto fragment = fragment_b(Shape<typename L::HeadDimV, typename L::BlockN>{});
      return GatheredOperand<decltype(fragment), Tile>{fragment, sV};
    }
  }

  /// acc += A B^T over all K-steps. The B operand comes in pieces of 16 columns of one K-step: one ldmatrix,
  /// which feeds 2 * MMA_M tensor-core instructions. k_tiles_per_load says how many pieces a fetch brings;
  /// with mma_double_buffer each is under way while its predecessors are multiplied. Single pieces go two
  /// ahead: that hides the latency of shared memory, and larger fetches only cost registers.
  template <class Accumulator, class A, class B>
  FLASHCUTE_DEVICE static void gemm(Accumulator& acc, A&& a, B&& b) {
    using namespace cute;
    constexpr int groups = decltype(size<1>(b.fragment))::value / 2;  // pieces of a K-step
    constexpr int k_steps = decltype(size<2>(b.fragment))::value;
    constexpr int pieces = k_steps * groups;
    constexpr int per_fetch = C.k_tiles_per_load == 0 ? 1 : C.k_tiles_per_load * groups;
    constexpr int ahead = !C.mma_double_buffer ? 0 : C.k_tiles_per_load == 0 ? 2 : 1;  // fetches
    constexpr int a_ahead = C.mma_double_buffer ? 1 : 0;                               // K-steps
    auto const fetch = [&](int first) {
      CUTE_UNROLL
      for (int t = first; t < first + per_fetch; ++t) {
        if (t < pieces) b.fetch(t / groups, t % groups);
      }
    };
    if constexpr (a_ahead > 0) a.fetch(0);
    CUTE_UNROLL
    for (int f = 0; f < ahead; ++f) fetch(f * per_fetch);
    CUTE_UNROLL
    for (int t = 0; t < pieces; ++t) {
      int const k = t / groups, group = t % groups;
      if (group == 0 && k + a_ahead < k_steps) a.fetch(k + a_ahead);
      if (t % per_fetch == 0) fetch(t + ahead * per_fetch);
      CUTE_UNROLL
      for (int n = 2 * group; n < 2 * group + 2; ++n) {
        CUTE_UNROLL
        for (int m = 0; m < size<1>(acc); ++m) {
          cute::gemm(Mma{}, a.fragment(_, m, k), b.fragment(_, n, k), acc(_, m, n));
        }
      }
    }
  }

 private:
  template <class Shape>
  FLASHCUTE_DEVICE static auto fragment_b(Shape const& shape) {  // (MMA, MMA_N, MMA_K)
    auto const any = cute::make_tensor(static_cast<typename L::Operand*>(nullptr), shape);
    return Mma{}.get_thread_slice(thread_index()).partition_fragment_B(any);
  }

  template <class Atom, class Tile, class Shape>
  FLASHCUTE_DEVICE static auto operand_b(Tile const& tile, Shape const& shape) {
    return shared_operand(fragment_b(shape), cute::make_tiled_copy_B(Atom{}, Mma{}), tile);
  }
};

}  // namespace flashcute
