// Prepares blocks of the tensors for the products: widens, transposes and replaces values that are not finite. Compiled
// once per instruction set; see forward_impl.hpp.
#pragma once

#include "cpu/gemm.hpp"
#include "cpu/vector.hpp"
#include "flashcute/core/forward_config.hpp"
#include "flashcute/core/forward_params.hpp"
#include "flashcute/policy/block_map.hpp"

namespace flashcute::cpu::FLASHCUTE_CPU_ISA {
namespace {

/// The type in which a dtype is stored, and that in which it is computed.
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

/// The sink of a query head, of fp32 or Element, as it is; -inf if there is none.
template <class Element>
double sink_of(ForwardParams const& p, int head) {
  if (p.sink.logits == nullptr) return -__builtin_inf();
  if (p.sink.float32) return static_cast<double>(static_cast<float const*>(p.sink.logits)[head]);
  return static_cast<double>(to_float(static_cast<Element const*>(p.sink.logits)[head]));
}

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

/// The transpose of `rows` rows, each times its factor(row), as `width` rows of `ld` with `columns` of them in use.
/// Lanes without a row compute on zeros rather than on what the scratch memory happens to hold.
template <class Element, class T, class Factor>
[[gnu::always_inline]] inline void load_transposed(Element const* from, int64_t stride, int rows, int width,
                                                   Factor factor, T* to, int64_t ld, int columns) {
  constexpr int elements_per_line = 64 / static_cast<int>(sizeof(Element));  // of the cache
  for (int r = 0; r < rows; ++r) {  // each row is used once, so all of them come from afar: ask for them together
    for (int i = 0; i < width; i += elements_per_line) __builtin_prefetch(from + r * stride + i);
  }
  for (int r = 0; r < rows; ++r) {
    T const times = factor(r);
    for (int i = 0; i < width; ++i) to[i * ld + r] = times * to_float(from[r * stride + i]);
  }
  for (int i = 0; i < width; ++i) {
    for (int r = rows; r < columns; ++r) to[i * ld + r] = 0;
  }
}

/// A factor as a product of two: a row's elements are multiplied by `before`, a power of two, which is exact; the
/// results of products with the row are multiplied by `after`.
template <class T>
struct SplitFactor {
  T before, after;
};

/// The bits of |x|, which are ordered as the numbers are: integers, so that a loop over them becomes vector code.
[[gnu::always_inline]] inline int32_t size_bits(float x) { return __builtin_bit_cast(int32_t, x) & INT32_MAX; }
[[gnu::always_inline]] inline int64_t size_bits(double x) { return __builtin_bit_cast(int64_t, x) & INT64_MAX; }

/// Splits the factor of the scores, for rows of X: `before` is as much of its power of two as the row allows. So no
/// product overflows unless the score does, and the largest element of the row neither overflows nor becomes so small
/// that the row loses digits.
template <class T>
class ScoreFactor {
 public:
  /// `factor` >= 0
  explicit ScoreFactor(double factor) : factor_{factor}, significand_{__builtin_frexp(factor, &exponent_)} {}

  template <class Element>
  [[gnu::always_inline]] SplitFactor<T> split(Element const* row, int width) const {
    using Limits = std_::numeric_limits<T>;
    if (factor_ == 0) return {0, 1};
    typename FloatTraits<T>::Int largest = 0;
    for (int i = 0; i < width; ++i) largest = max_of(largest, size_bits(to_float(row[i])));
    // All elements are below 2^of_row; for rows that are not finite or below the smallest normal number that is
    // approximate.
    int const of_row = static_cast<int>(largest >> FloatTraits<T>::mantissa_bits) - FloatTraits<T>::exponent_bias + 1;
    int const least = Limits::min_exponent + Limits::digits - of_row, most = Limits::max_exponent - of_row;
    int exponent = min_of(max_of(exponent_, least), most);
    exponent = min_of(max_of(exponent, Limits::min_exponent), Limits::max_exponent - 1);  // a normal number of the type
    auto const bits = static_cast<typename FloatTraits<T>::Int>(exponent + FloatTraits<T>::exponent_bias)
                      << FloatTraits<T>::mantissa_bits;
    double const after = exponent == exponent_ ? significand_ : __builtin_ldexp(factor_, -exponent);
    return {__builtin_bit_cast(T, bits), static_cast<T>(after)};
  }

 private:
  int exponent_ = 0;
  double const factor_, significand_;  // factor = significand * 2^exponent, significand in [1/2, 1)
};

/// Calls select(r, c, seen) for each vector of a block, in row r and from column c on, of which a map hides some
/// element; `seen` are the lanes that it shows. Rows of the block are rows of the map from `row0` on, lanes its columns
/// from `lane0` on: a word of the map lies along a vector.
template <class T, class Select>
[[gnu::always_inline]] inline void for_each_hidden(CellMap const& map, int row0, int rows, int lane0, int columns,
                                                   Select select) {
  if (!map.exists()) return;
  for (int r = 0; r < rows; ++r) {
    for (int first = 0; first < columns; first += cell_size) {
      uint64_t const seen = map.columns_from(row0 + r, lane0 + first, false);
      if (seen == ~uint64_t{0}) continue;
      for (int c = first; c < min_of(first + cell_size, columns); c += lanes<T>) {
        select(r, c, lanes_of_bits<T>(seen >> (c - first)));
      }
    }
  }
}

template <class T>
[[gnu::always_inline]] inline void clear(T* matrix, int rows, int64_t ld, int columns) {
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) matrix[r * ld + c] = 0;
  }
}

/// How many blocks are summed one by one before their sum is added to a total.
constexpr int blocks_per_total = 32;

/// A matrix of sums over blocks whose error does not grow with their number: every few blocks the sums are added to
/// totals, and the rounding error of each addition to a matrix of errors (Knuth's two-sum, exact whichever operand is
/// larger).
template <class T>
class Totals {
 public:
  Totals(T* sums, T* totals, T* errors, int rows, int64_t ld, int columns)
      : sums_{sums}, totals_{totals}, errors_{errors}, rows_{rows}, ld_{ld}, columns_{columns} {}

  /// total = factor(column) * total + sum, sum = 0.
  template <class Factor>
  void add(Factor factor) {
    for (int r = 0; r < rows_; ++r) {
      for (int c = 0; c < columns_; c += lanes<T>) {
        T* const at[] = {sums_ + r * ld_ + c, totals_ + r * ld_ + c, errors_ + r * ld_ + c};
        Vector<T> const x = load(at[0]);
        store(at[0], Vector<T>{});
        if (empty_) {
          store(at[1], x);
          store(at[2], Vector<T>{});
        } else {
          Vector<T> const total = load(at[1]) * factor(c), sum = total + x, added = sum - total;
          store(at[1], sum);
          store(at[2], load(at[2]) * factor(c) + ((total - (sum - added)) + (x - added)));
        }
      }
    }
    empty_ = false;
  }
  void add() {
    add([](int) { return broadcast(T{1}); });
  }

  /// Writes the totals of everything that was added to the sums.
  template <class Factor>
  void finish(Factor factor) {
    if (empty_) return;
    add(factor);
    for (int r = 0; r < rows_; ++r) {
      for (int c = 0; c < columns_; c += lanes<T>) {
        Vector<T> const error = load(errors_ + r * ld_ + c);
        // The error of a total that is not finite is NaN.
        store(sums_ + r * ld_ + c, load(totals_ + r * ld_ + c) + (error - error == 0 ? error : Vector<T>{}));
      }
    }
  }
  void finish() {
    finish([](int) { return broadcast(T{1}); });
  }

 private:
  T *const sums_, *const totals_, *const errors_;
  int const rows_;
  int64_t const ld_;
  int const columns_;
  bool empty_ = true;
};

template <class T>
[[gnu::always_inline]] inline bool is_finite(T x) {
  return x - x == 0;
}

/// In a partial block only some lanes may see a row of `a`; in the others 0 * NaN would make the sum NaN.
/// Returns `a` if all of it is finite, else a copy with 0 in place of other values.
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

/// Adds to `sum` = A^T W the terms with the values that `finite_part` replaced by 0, in the lanes that see them.
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
