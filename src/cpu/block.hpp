// Blocks of matrices on their way from the tensors into the products: widened, transposed, rid of what is not
// finite. Compiled once per instruction set; see forward_impl.hpp.
#pragma once

#include "flashcute/config.hpp"
#include "gemm.hpp"
#include "vector.hpp"

namespace flashcute::cpu::FLASHCUTE_CPU_ISA {
namespace {

/// How a dtype is stored, and what is computed in.
template <DType>
struct ElementOf;
template <>
struct ElementOf<DType::float16> {
  using type = Half;
  using Accumulator = float;
};
template <>
struct ElementOf<DType::bfloat16> {
  using type = Bfloat16;
  using Accumulator = float;
};
template <>
struct ElementOf<DType::float32> {
  using type = float;
  using Accumulator = float;
};
template <>
struct ElementOf<DType::float64> {
  using type = double;
  using Accumulator = double;
};

/// `rows` rows of a tensor, `width` columns each, in the accumulation type: in place, or widened into `buffer`.
template <class Element, class T>
[[gnu::always_inline]] inline RowMajor<T> load_block(Element const* from, int64_t stride, int rows, int width,
                                                     T* buffer) {
  if constexpr (__is_same(Element, T)) {
    return {from, stride};
  } else {
    for (int r = 0; r < rows; ++r) widen(from + r * stride, buffer + r * width, width);
    return {buffer, width};
  }
}

/// factor times the transpose of `rows` rows, as `width` rows of `ld` with `columns` of them in use. Lanes without
/// a row compute on zeros rather than on what the scratch memory happens to hold.
template <class Element, class T>
[[gnu::always_inline]] inline void load_transposed(Element const* from, int64_t stride, int rows, int width, T factor,
                                                   T* to, int64_t ld, int columns) {
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < width; ++i) to[i * ld + r] = factor * to_float(from[r * stride + i]);
  }
  for (int i = 0; i < width; ++i) {
    for (int r = rows; r < columns; ++r) to[i * ld + r] = 0;
  }
}

template <class T>
[[gnu::always_inline]] inline void clear(T* matrix, int rows, int64_t ld, int columns) {
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) matrix[r * ld + c] = 0;
  }
}

template <class T>
[[gnu::always_inline]] inline bool is_finite(T x) {
  return x - x == 0;
}

/// In a partial block a row of `a` may be seen by some lanes only, and 0 * NaN would poison the others.
/// Gives back `a` where all of it is finite, else a copy with 0 in place of what is not.
template <class T>
[[gnu::always_inline]] inline RowMajor<T> finite_part(RowMajor<T> a, int rows, int width, T* copy) {
  int found = 0;
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < width; ++i) found |= !is_finite(a(r, i));
  }
  if (!found) return a;
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < width; ++i) copy[r * width + i] = is_finite(a(r, i)) ? a(r, i) : 0;
  }
  return {copy, width};
}

/// Adds to `sum` = A^T W what `finite_part` left out of A, to the lanes that see it.
template <class T, class Visible>
[[gnu::always_inline]] inline void add_not_finite(RowMajor<T> a, int rows, int width, T const* weights, T* sum,
                                                  int64_t ld, int lanes_in_use, Visible visible) {
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < width; ++i) {
      if (is_finite(a(r, i))) continue;
      for (int c = 0; c < lanes_in_use; ++c) {
        if (visible(r, c)) sum[i * ld + c] += a(r, i) * weights[r * ld + c];
      }
    }
  }
}

}  // namespace
}  // namespace flashcute::cpu::FLASHCUTE_CPU_ISA
