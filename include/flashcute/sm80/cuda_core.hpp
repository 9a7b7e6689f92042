// Matrix products by the CUDA cores: fused multiply-adds in fp32, operands straight from shared memory. A thread
// computes the elements that it would hold if the tensor cores had computed them, so the rest of the kernel is the
// same.
#pragma once

#include "flashcute/sm80/gemm.hpp"

namespace flashcute {

template <TileConfig C>
struct Products<C, Math::cuda_core> {
  using L = TileLayout<C>;
  using Element = typename L::Element;

  static constexpr bool wants_finite = false;

  /// A tile in shared memory, read in place. Its addresses are those of CuTe, split by hand into what depends on the
  /// thread and what is constant: rows r and r + 8 i have the same swizzle, which the compiler does not see.
  template <class Smem>
  struct SharedRows {
    Element const* tile;

    /// Row `row` of the chunk that starts at column `first`.
    FLASHCUTE_DEVICE Element const* chunk_row(int row, int first) const {
      return tile + first * Smem::rows + row * Smem::shape.chunk;
    }
  };

  /// Probabilities in the registers of the four lanes that share a row.
  template <class Scores>
  struct QuadRows {
    Scores& p;  // (MMA, MMA_M, MMA_N)
  };

  FLASHCUTE_DEVICE static auto query(Element const* tile) { return SharedRows<typename L::SmemQ>{tile}; }

  FLASHCUTE_DEVICE static auto key(Element const* tile) { return SharedRows<typename L::SmemK>{tile}; }

  template <class Scores>
  FLASHCUTE_DEVICE static auto probabilities(Scores& p) {
    return QuadRows<Scores>{p};
  }

  FLASHCUTE_DEVICE static auto value(Element const* tile) { return SharedRows<typename L::SmemV>{tile}; }

  /// S += Q K^T. Each 16 bytes of a row of Q serve all columns of the thread, each of a row of K all its rows.
  template <class Accumulator>
  FLASHCUTE_DEVICE static void gemm(Accumulator& acc, SharedRows<typename L::SmemQ> const& q,
                                    SharedRows<typename L::SmemK> const& k) {
    using namespace cute;
    auto s = by_row_and_column(acc);   // (row, column)
    auto const c = by_row_and_column(  // -> (row, column)
        L::template coordinates<typename L::BlockM, typename L::BlockN>(thread_index()));
    constexpr int rows = decltype(size<0>(s))::value, columns = decltype(size<1>(s))::value;
    constexpr int chunk = L::SmemQ::shape.chunk, unit = L::SmemQ::unit;
    int const q_mask = L::SmemQ::mask(get<0>(c(0, 0)));
    int const k_mask[2] = {L::SmemK::mask(get<1>(c(0, 0))),
                           L::SmemK::mask(get<1>(c(0, 1)))};  // of even and odd columns
    CUTE_NO_UNROLL
    for (int first = 0; first < C.head_dim; first += chunk) {
      auto const* const q_row = q.chunk_row(get<0>(c(0, 0)), first);
      auto const* const k_row = k.chunk_row(get<1>(c(0, 0)), first);
      CUTE_UNROLL
      for (int u = 0; u < chunk / unit; ++u) {
        float a[rows][unit], b[unit];
        CUTE_UNROLL
        for (int i = 0; i < rows; ++i) load<unit>(q_row + (u ^ q_mask) * unit + L::row_distance(i) * chunk, a[i]);
        CUTE_UNROLL
        for (int j = 0; j < columns; ++j) {
          load<unit>(k_row + (u ^ k_mask[j % 2]) * unit + L::column_distance(j) * chunk, b);
          CUTE_UNROLL
          for (int x = 0; x < unit; ++x) {
            CUTE_UNROLL
            for (int i = 0; i < rows; ++i) s(i, j) += a[i][x] * b[x];
          }
        }
      }
    }
  }

  /// O += P V, key by key: a shuffle from the lane that holds a probability passes it to the lanes of its row.
  /// Overwrites P.
  template <class Accumulator, class Scores>
  FLASHCUTE_DEVICE static void gemm(Accumulator& acc, QuadRows<Scores> const& scores,
                                    SharedRows<typename L::SmemV> const& v) {
    using namespace cute;
    auto o = by_row_and_column(acc);       // (row, head dim)
    auto p = by_row_and_column(scores.p);  // (row, column)
    constexpr int rows = decltype(size<0>(o))::value, columns = decltype(size<1>(o))::value;
    constexpr int held = decltype(size<1>(p))::value;
    constexpr int chunk = L::SmemV::shape.chunk, unit = L::SmemV::unit;
    constexpr int lane_units = 8 / unit - 1;  // the bits of a unit's index in which the lanes of a quad differ
    int const lane_column = thread_index() % 4 * 2;
    // Eight keys at a time, two in each lane's registers. Registers need constant indices, so P is shifted down by two.
    CUTE_NO_UNROLL
    for (int key0 = 0; key0 < C.block_n; key0 += 8) {
      CUTE_UNROLL
      for (int key = 0; key < 8; ++key) {
        int const mask = L::SmemV::mask(key);
        int const lane_offset = (lane_column / unit ^ (mask & lane_units)) * unit + lane_column % unit;
        float a[rows];
        CUTE_UNROLL
        for (int i = 0; i < rows; ++i) a[i] = shuffle<4>(p(i, key % 2), key / 2);
        CUTE_UNROLL
        for (int j = 0; j < columns; j += 2) {
          int const column = L::column_distance(j);  // of lane 0
          int const first_unit = column % chunk / unit ^ (mask & ~lane_units);
          float b[2];
          load<2>(v.chunk_row(key0 + key, column / chunk * chunk) + first_unit * unit + lane_offset, b);
          CUTE_UNROLL
          for (int i = 0; i < rows; ++i) {
            o(i, j) += a[i] * b[0];
            o(i, j + 1) += a[i] * b[1];
          }
        }
      }
      CUTE_UNROLL
      for (int j = 0; j + 2 < held; ++j) {
        CUTE_UNROLL
        for (int i = 0; i < rows; ++i) p(i, j) = p(i, j + 2);
      }
    }
  }

 private:
  template <int Count>
  struct alignas(Count * sizeof(Element)) Neighbours {
    Element element[Count];
  };

  /// Count neighbouring elements as fp32.
  template <int Count>
  FLASHCUTE_DEVICE static void load(Element const* from, float* to) {
    auto const neighbours = shared_load<Neighbours<Count>>(from);
    CUTE_UNROLL
    for (int e = 0; e < Count; ++e) to[e] = static_cast<float>(neighbours.element[e]);
  }
};

}  // namespace flashcute
