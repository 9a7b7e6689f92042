// C = A B for a block that fits the cache. The columns of B and C are in vector lanes, and each element of A is
// broadcast: A is read in place, with any stride, and nothing is packed.
#pragma once

#include "cpu/vector.hpp"

namespace flashcute::cpu::FLASHCUTE_CPU_ISA {
namespace {

/// A matrix in memory; neighbours in a row are adjacent.
template <class T>
struct RowMajor {
  T const* data;
  int64_t stride;

  [[gnu::always_inline]] T operator()(int row, int column) const { return data[row * stride + column]; }
  [[gnu::always_inline]] RowMajor from_row(int row) const { return {data + row * stride, stride}; }
};

/// The transpose of a matrix in memory.
template <class T>
struct Transposed {
  T const* data;
  int64_t stride;

  [[gnu::always_inline]] T operator()(int row, int column) const { return data[column * stride + row]; }
  [[gnu::always_inline]] Transposed from_row(int row) const { return {data + row, stride}; }
};

template <class T>
[[gnu::always_inline]] inline Transposed<T> transpose(RowMajor<T> a) {
  return {a.data, a.stride};
}

// The accumulators of one register tile: all registers but those for B's vectors and one element of A.
constexpr int max_tile_vectors = vector_registers == 32 ? 4 : 2;
constexpr int tile_accumulators = vector_registers == 32 ? 24 : 12;
constexpr int max_tile_rows = 8;  // with more, single queries (C = 1) ran about 10 % slower

/// One register tile, R rows by C vectors. `finish(row, column, sum)` gets each vector of A B once.
template <int R, int C, class A, class T, class Finish>
[[gnu::always_inline]] inline void gemm_tile(A a, T const* b, int64_t ld, int depth, Finish finish) {
  Vector<T> sum[R][C] = {};
  for (int k = 0; k < depth; ++k, b += ld) {
    Vector<T> b_row[C];
#pragma GCC unroll 32
    for (int c = 0; c < C; ++c) b_row[c] = load(b + c * lanes<T>);
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      Vector<T> const a_rk = broadcast(a(r, k));
#pragma GCC unroll 32
      for (int c = 0; c < C; ++c) sum[r][c] += a_rk * b_row[c];
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 32
    for (int c = 0; c < C; ++c) finish(r, c * lanes<T>, sum[r][c]);
  }
}

/// All rows of a strip of C vectors: the tallest register tile first, then smaller ones.
template <int C, class A, class T, class Finish>
[[gnu::always_inline]] inline void gemm_strip(A a, int rows, T const* b, int64_t ld, int depth, Finish finish) {
  int row = 0;
  auto const with_height = [&]<int R>(std_::integral_constant<int, R>) __attribute__((always_inline)) {
    for (; row + R <= rows; row += R) {
      gemm_tile<R, C>(a.from_row(row), b, ld, depth,
                      [&](int r, int column, Vector<T> sum)
                          __attribute__((always_inline)) { finish(row + r, column, sum); });
    }
  };
  with_height(std_::integral_constant<int, min_of(max_tile_rows, tile_accumulators / C)>{});
  with_height(std_::integral_constant<int, 4>{});
  with_height(std_::integral_constant<int, 2>{});
  with_height(std_::integral_constant<int, 1>{});
}

/// Calls finish(row, column, sum) once for each vector of A (rows x depth) times B (depth x columns).
/// B is aligned, `ld` elements a row; `columns` is a multiple of the vector length. Each sum starts at
/// zero and runs over the depth in order, so its value depends on no other row or column.
/// Not inlined: all element types that are computed in T, and full and partial blocks, share one copy.
template <class A, class T, class Finish>
[[gnu::noinline]] void gemm(A a, int rows, T const* b, int64_t ld, int depth, int columns, Finish finish) {
  int column = 0;
  auto const with_width = [&]<int C>(std_::integral_constant<int, C>) __attribute__((always_inline)) {
    for (; column + C * lanes<T> <= columns; column += C * lanes<T>) {
      gemm_strip<C>(a, rows, b + column, ld, depth, [&](int row, int c, Vector<T> sum) __attribute__((always_inline)) {
        finish(row, column + c, sum);
      });
    }
  };
  if constexpr (max_tile_vectors == 4) {
    with_width(std_::integral_constant<int, 4>{});
    with_width(std_::integral_constant<int, 3>{});
  }
  with_width(std_::integral_constant<int, 2>{});
  with_width(std_::integral_constant<int, 1>{});
}

/// C = A B diag(factor)
template <class T>
struct ScaleAndAssign {
  T* c;
  int64_t ld;
  T const* factor;

  [[gnu::always_inline]] void operator()(int row, int column, Vector<T> sum) const {
    store(c + row * ld + column, sum * load(factor + column));
  }
};

/// C = C + A B
template <class T>
struct Add {
  T* c;
  int64_t ld;

  [[gnu::always_inline]] void operator()(int row, int column, Vector<T> sum) const {
    T* const to = c + row * ld + column;
    store(to, load(to) + sum);
  }
};

/// C = C diag(factor) + A B
template <class T>
struct RescaleAndAdd {
  T* c;
  int64_t ld;
  T const* factor;

  [[gnu::always_inline]] void operator()(int row, int column, Vector<T> sum) const {
    T* const to = c + row * ld + column;
    store(to, load(to) * load(factor + column) + sum);
  }
};

}  // namespace
}  // namespace flashcute::cpu::FLASHCUTE_CPU_ISA
