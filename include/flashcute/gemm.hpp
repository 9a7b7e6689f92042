// Warp-level matrix products. An operand is register fragments plus where they are filled from; the
// product fetches the fragments of the next K-step while the tensor cores work on this one.
#pragma once

#include "flashcute/fragment.hpp"

namespace flashcute {

/// Fragments that ldmatrix fills, one K-step at a time, from a tile in shared memory.
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

  /// Rows [16 i, 16 i + 16) of K-step k.
  FLASHCUTE_DEVICE void fetch(int k, int i) {
    auto to = cute::make_tensor(fragment.data(), destination);
    cute::copy(copy, source(cute::_, i, k), to(cute::_, i, k));
  }
};

template <class Fragment, class TiledCopy, class Tile>
FLASHCUTE_DEVICE auto shared_operand(Fragment const& fragment, TiledCopy const& copy, Tile const& tile, int thread) {
  auto const slice = copy.get_thread_slice(thread);
  auto const source = slice.partition_S(tile);
  auto const destination = slice.retile_D(fragment).layout();
  return SharedOperand<Fragment, TiledCopy, decltype(source), decltype(destination)>{fragment, copy, source,
                                                                                     destination};
}

/// Fragments that are already in registers (or a view of them).
template <class Fragment>
struct RegisterOperand {
  Fragment fragment;  // (MMA, MMA_M or MMA_N, MMA_K)

  FLASHCUTE_DEVICE void fetch(int) const {}
};

/// acc += A B^T over all K-steps, 16 columns of B at a time: one ldmatrix feeds 2 * MMA_M tensor-core
/// instructions, and is issued `ahead` groups before they need it. Loading whole K-steps ahead would
/// hide no more latency and cost 4 * MMA_N registers.
template <class TiledMma, class Accumulator, class A, class B>
FLASHCUTE_DEVICE void gemm(TiledMma const& mma, Accumulator& acc, A&& a, B&& b) {
  using namespace cute;
  constexpr int ahead = 2;
  constexpr int groups = decltype(size<1>(b.fragment))::value / 2;
  constexpr int steps = decltype(size<2>(b.fragment))::value * groups;
  a.fetch(0);
  CUTE_UNROLL
  for (int t = 0; t < ahead; ++t) b.fetch(t / groups, t % groups);
  CUTE_UNROLL
  for (int t = 0; t < steps; ++t) {
    int const k = t / groups, group = t % groups;
    if (group == 0 && t + groups < steps) a.fetch(k + 1);
    if (t + ahead < steps) b.fetch((t + ahead) / groups, (t + ahead) % groups);
    CUTE_UNROLL
    for (int n = 2 * group; n < 2 * group + 2; ++n) {
      CUTE_UNROLL
      for (int m = 0; m < size<1>(acc); ++m) cute::gemm(mma, a.fragment(_, m, k), b.fragment(_, n, k), acc(_, m, n));
    }
  }
}

}  // namespace flashcute
