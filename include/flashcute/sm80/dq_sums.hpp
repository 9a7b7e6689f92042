// Sums in fp32 that become dQ. The tiles of keys that a query sees add to them in any order, by atomic additions: the
// last bits of the result differ from run to run. A tile of sums is stored in the order in which the threads of a block
// hold it, so that a warp adds to contiguous memory.
#pragma once

#include "flashcute/core/backward_config.hpp"
#include "flashcute/core/backward_params.hpp"
#include "flashcute/policy/query_tile.hpp"
#include "flashcute/sm80/store.hpp"
#include "flashcute/sm80/tf32x3.hpp"

namespace flashcute {

/// The sums of tiles of `block_m` queries, for the kernels of configuration B.
template <BackwardConfig B>
class QueryGradientSums {
  static constexpr TileConfig C = tile_of(B, BackwardPass::gradients);
  using L = TileLayout<C>;

 public:
  static constexpr int warps_n = dq_column_warps(B);
  using Products = TileProducts<C, warps_n>;

  /// This thread's part of a tile, set to 0.
  FLASHCUTE_DEVICE static auto fragment() {
    return L::template accumulator<typename L::BlockN, typename L::HeadDim, warps_n>();  // (MMA, MMA_M, MMA_D)
  }

  /// (query, column) of every element of the fragment.
  FLASHCUTE_DEVICE static auto coordinates() {
    return L::template coordinates<typename L::BlockN, typename L::HeadDim, warps_n>(thread_index());
  }

  /// This thread's part of the tile of block `block` of the query rows of a head and a batch entry.
  template <class Sequence>
  FLASHCUTE_DEVICE static QueryGradientSums of(BackwardParams const& p, typename Sequence::Entry const& entry, int head,
                                               int block) {
    ForwardParams const& f = p.forward;
    int64_t const heads_before = static_cast<int64_t>(entry.batch) * f.heads + head;
    int64_t const tiles_before = heads_before * QueryTile<Sequence>::blocks_of_head(f, B.block_m);
    return QueryGradientSums(p, tiles_before + (entry.first_query_block(B.block_m) + block));
  }

  /// Of a tile's rows.
  template <class Sequence>
  FLASHCUTE_DEVICE static QueryGradientSums of(BackwardParams const& p, QueryTile<Sequence> const& tile) {
    return of<Sequence>(p, tile.entry, tile.head, tile.row0 / B.block_m);
  }

  FLASHCUTE_DEVICE void clear() const {
    CUTE_UNROLL
    for (int i = 0; i < words; ++i) global_store(at(i), Word{});
  }

  /// Adds the product of two operands. Keeps all of the left operand or all results in registers, whichever is less;
  /// with tf32x3 neither: its product fetches the left operand again for every 16 columns anyway.
  template <class OperandA, class OperandB>
  FLASHCUTE_DEVICE void add_product(OperandA a, OperandB b) const {
    constexpr int depth = decltype(cute::size<2>(a.fragment))::value;    // in K-steps
    constexpr int columns = decltype(cute::size<1>(b.fragment))::value;  // in n8
    auto const add_columns = [&](int n, auto const& sums) { add(n * cute::size(sums), sums); };
    if constexpr (B.math == Math::tf32x3) {
      Products::gemm_by_columns(a, b, add_columns);
    } else if constexpr (depth + 2 < columns) {
      Products::gemm_by_columns(held(a), b, add_columns);
    } else {
      auto sums = fragment();
      Products::gemm(sums, a, b);
      add(0, sums);
    }
  }

  /// Adds to this thread's i-th element alone.
  FLASHCUTE_DEVICE void add(int i, float x) const { reduce_add<1>(at(i / width) + i % width, &x); }

  template <class Fragment>
  FLASHCUTE_DEVICE void load(Fragment& x) const {
    CUTE_UNROLL
    for (int i = 0; i < words; ++i) {
      auto const word = global_load<Word>(at(i));
      CUTE_UNROLL
      for (int j = 0; j < width; ++j) x(i * width + j) = reinterpret_cast<float const*>(&word)[j];
    }
  }

 private:
  /// Tile `tile` of all.
  FLASHCUTE_DEVICE QueryGradientSums(BackwardParams const& p, int64_t tile) {
    first_ = static_cast<float*>(p.dq_sums) + tile * (B.block_m * B.head_dim) + thread_index() * width;
  }

  /// Adds to this thread's elements from number `first` on.
  template <class Fragment>
  FLASHCUTE_DEVICE void add(int first, Fragment const& x) const {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(x); i += width) reduce_add<width>(at((first + i) / width), &x(i));
  }

  static constexpr int width = reduction_width;  // floats of one thread that are contiguous
  static constexpr int words = B.block_m * B.head_dim / L::threads / width;
  using Word = cute::uint_bit_t<32 * width>;

  FLASHCUTE_DEVICE float* at(int i) const { return first_ + i * L::threads * width; }

  float* first_;
};

}  // namespace flashcute
