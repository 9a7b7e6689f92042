// The forward pass of one tile, compiled once per instruction set: forward_<isa>.cpp defines
// FLASHCUTE_CPU_ISA and includes this file. All but `forward_tile` has internal linkage: were an inline
// function or a template of the AVX-512 file visible to the linker, it could replace the baseline's copy
// of the same name (tools/check_isa_symbols.py checks).
//
// The lanes of a vector are queries. S^T = K Q^T has a row per key and a column per query, so row maximum, row sum and
// the rescaling of O need no reduction across lanes; K and V are read in place, one element broadcast to all queries;
// and a query's result never depends on its neighbours'.
#pragma once

#include "cpu/block.hpp"
#include "cpu/forward_isa.hpp"
#include "cpu/forward_scratch.hpp"
#include "flashcute/core/constants.hpp"
#include "flashcute/policy/block_counter.hpp"

namespace flashcute::cpu::FLASHCUTE_CPU_ISA {
namespace {

template <class T>
constexpr T infinity = std_::numeric_limits<T>::infinity();  // a constant: calls nothing at run time

/// Softmax over keys that arrive block by block, in base 2. A row that has seen nothing but -inf keeps
/// row_max = -inf and row_sum = 0.
template <class T>
struct OnlineSoftmax {
  T* row_max;
  T* row_sum;
  T* correction;  // of the last update: O must be multiplied by it
  T* pending;     // the product of all corrections since the last add_to
  int64_t ld;
  int columns;

  void clear() const {
    for (int m = 0; m < columns; ++m) row_max[m] = -infinity<T>, row_sum[m] = 0, pending[m] = 1;
  }

  /// Turns `keys` rows of S^T into P^T.
  void update(T* scores, int keys) const {
    for (int m = 0; m < columns; m += lanes<T>) {
      Vector<T> const old_max = load(row_max + m);
      Vector<T> const new_max = max_over(scores + m, keys, old_max);
      // -inf - -inf is NaN; with 0 in place of the maximum such scores give P = 0, as they should.
      Vector<T> const reference = new_max == -infinity<T> ? Vector<T>{} : new_max;
      Vector<T> sum = {};
      for (int n = 0; n < keys; ++n) {
        T* const s = scores + n * ld + m;
        Vector<T> const p = exp2<T>(load(s) - reference);
        store(s, p);
        sum += p;
      }
      Vector<T> const factor = exp2<T>(old_max - reference);
      store(correction + m, factor);
      store(pending + m, load(pending + m) * factor);
      store(row_sum + m, load(row_sum + m) * factor + sum);
      store(row_max + m, new_max);
    }
  }

  /// Adds row_sum and O to `totals`, which are first rescaled to the current maximum.
  void add_to(Totals<T>& totals) const {
    totals.add([&](int m) { return load(pending + m); });
    for (int m = 0; m < columns; ++m) pending[m] = 1;
  }

  void finish(Totals<T>& totals) const {
    totals.finish([&](int m) { return load(pending + m); });
  }

  /// The sink is a further logit of value 0, in base 2; -inf is none.
  T divisor(int m, double sink) const {
    if (sink == -__builtin_inf()) return row_sum[m];
    return static_cast<T>(static_cast<double>(row_sum[m]) + __builtin_exp2(sink - static_cast<double>(row_max[m])));
  }

  T lse(int m, double sink) const {
    double base = static_cast<double>(row_max[m]), sum = static_cast<double>(row_sum[m]);
    if (sink != -__builtin_inf()) {
      double const highest = base > sink ? base : sink;  // NaN if the sink is NaN
      sum = sum * __builtin_exp2(base - highest) + (sink == highest ? 1 : __builtin_exp2(sink - highest));
      base = highest;
    }
    return static_cast<T>(ln2<double> * (base + __builtin_log2(sum)));
  }

 private:
  /// Ignores NaN, which reaches the result through P.
  Vector<T> max_over(T const* s, int keys, Vector<T> start) const {
    constexpr int chains = 4;  // independent maxima: one alone is bound by latency
    Vector<T> best[chains] = {start, start, start, start};
    int n = 0;
    for (; n + chains <= keys; n += chains) {
#pragma GCC unroll 4
      for (int c = 0; c < chains; ++c) best[c] = max(load(s + (n + c) * ld), best[c]);
    }
    for (; n < keys; ++n) best[0] = max(load(s + n * ld), best[0]);
    return max(max(best[0], best[1]), max(best[2], best[3]));
  }

  [[gnu::always_inline]] static Vector<T> max(Vector<T> x, Vector<T> best) { return x > best ? x : best; }
};

template <DType dtype>
class ForwardTile {
  using Element = typename ElementOf<dtype>::type;
  using T = typename ElementOf<dtype>::Accumulator;

 public:
  static void run(ForwardConfig const& config, MaskFunctions const& mask, ForwardParams const& params, int64_t index,
                  void* memory) {
    ForwardTile const tile{config, mask, params, index, static_cast<T*>(memory)};
    if (tile.tile_.rows > 0) tile.compute();  // else a slot that no sequence needs
  }

 private:
  ForwardTile(ForwardConfig const& config, MaskFunctions const& mask, ForwardParams const& params, int64_t index,
              T* memory)
      : p_{params},
        mask_{mask},
        tile_{Queries::at(params, index, config.block_m)},
        block_m_{config.block_m},
        block_n_{config.block_n},
        columns_{ceil_div(tile_.rows, lanes<T>) * lanes<T>},
        layout_{ForwardScratch::of(config)},
        memory_{memory} {}

  void compute() const {
    T* const q = memory_ + layout_.q;
    T* const s = memory_ + layout_.scores;
    T* const o = memory_ + layout_.out;
    int64_t const ld = layout_.ld;
    OnlineSoftmax<T> const softmax{memory_ + layout_.row_max,
                                   memory_ + layout_.row_sum,
                                   memory_ + layout_.correction,
                                   memory_ + layout_.pending,
                                   ld,
                                   columns_};
    Totals<T> totals{
        memory_ + layout_.row_sum, memory_ + layout_.totals, memory_ + layout_.errors, 1 + p_.head_dim_v, ld, columns_};
    load_query(q);
    mask_.keys_of_queries(tile_.row0, tile_.rows, tile_.sequence(p_), visible_keys());
    clear(o, p_.head_dim_v, ld, columns_);
    softmax.clear();
    BlockCounter<true> counter;
    auto const range = mask_.kv_range(tile_, p_, block_n_);
    range.for_each_backward([&](int n, auto partial) {
      counter.visit(partial.value);
      int const key0 = n * block_n_;
      int const keys = min_of(block_n_, tile_.sequence(p_).keys() - key0);  // nothing beyond the sequence is touched
      RowMajor<T> const k = load_block(key_block(p_.k, tile_.k_offset(p_), p_.k_stride, key0), p_.k_stride.row, keys,
                                       p_.head_dim, memory_ + layout_.k);
      RowMajor<T> const v = load_block(key_block(p_.v, tile_.v_offset(p_), p_.v_stride, key0), p_.v_stride.row, keys,
                                       p_.head_dim_v, memory_ + layout_.v);

      gemm(k, keys, q, ld, p_.head_dim, columns_,  // S^T = K Q^T
           ScaleAndAssign<T>{s, ld, memory_ + layout_.factor});
      if constexpr (partial.value) apply_mask(s, key0, keys);
      softmax.update(s, keys);  // S^T becomes P^T
      RowMajor<T> const seen_v = partial.value ? finite_part(v, keys, p_.head_dim_v, memory_ + layout_.finite_v) : v;
      gemm(transpose(seen_v), p_.head_dim_v, s, ld, keys, columns_,  // O^T = O^T diag(correction) + V^T P^T
           RescaleAndAdd<T>{o, ld, softmax.correction});
      if constexpr (partial.value) {
        if (seen_v.data != v.data) {
          CellMap const map = tile_.sequence(p_).by_query();
          add_not_finite(v, keys, p_.head_dim_v, s, o, ld, tile_.rows, [&](int n, int m) {
            return visible_keys()[m].has(key0 + n) && map.sees(tile_.row0 + m, key0 + n);
          });
        }
      }
      // By the number of the block, not by how many were visited: a row's result does not depend on its tile.
      if (n > 0 && n % blocks_per_total == 0) softmax.add_to(totals);
    });
    softmax.finish(totals);
    store_out(o, softmax);
    if (p_.lse != nullptr) store_lse(softmax);
    if (p_.block_counts != nullptr) {
      p_.block_counts[tile_.block_counts_offset(p_, block_m_)] = counter.counts(tile_.sequence(p_), block_n_);
    }
  }

  Element const* key_block(void const* base, int64_t offset, Strides const& stride, int key0) const {
    return static_cast<Element const*>(base) + offset + key0 * stride.row;
  }

  /// Loads Q^T, and the factor that turns its products with keys into scores in units of log2: scale * log2(e).
  void load_query(T* q) const {
    Element const* const from = static_cast<Element const*>(p_.q) + tile_.q_offset(p_);
    T* const factor = memory_ + layout_.factor;
    ScoreFactor<T> const score_factor{p_.scale * log2_e<double>};
    auto const before = [&](int r) {
      SplitFactor<T> const f = score_factor.split(from + r * p_.q_stride.row, p_.head_dim);
      factor[r] = f.after;
      return f.before;
    };
    load_transposed(from, p_.q_stride.row, tile_.rows, p_.head_dim, before, q, layout_.ld, columns_);
    for (int r = tile_.rows; r < columns_; ++r) factor[r] = 0;
  }

  /// By selection: a masked score may be NaN.
  void apply_mask(T* s, int key0, int keys) const {
    RowRange const* const visible = visible_keys();
    for (int n = 0; n < keys; ++n) {
      for (int m = 0; m < tile_.rows; ++m) {
        T const score = s[n * layout_.ld + m];
        s[n * layout_.ld + m] = visible[m].has(key0 + n) ? score : -infinity<T>;
      }
    }
    for_each_hidden<T>(tile_.sequence(p_).by_key(), key0, keys, tile_.row0, columns_,
                       [&](int n, int m, LaneMask<T> seen) {
                         T* const at = s + n * layout_.ld + m;
                         store(at, seen ? load(at) : broadcast(-infinity<T>));
                       });
  }

  /// In base 2.
  double sink() const { return log2_e<double> * sink_of<Element>(p_, tile_.head); }

  /// What a row gets in place of its result: nothing is known of it where a map is wrong.
  static constexpr T unknown = static_cast<T>(__builtin_nan(""));

  /// A row whose visible scores are all -inf becomes 0 / 0 = NaN, as it should.
  void store_out(T* o, OnlineSoftmax<T> const& softmax) const {
    double const sink = this->sink();
    int const spoiled = CellMap::overflowed(p_) ? tile_.existing(p_) : 0;  // rows
    Element* const to = static_cast<Element*>(p_.out) + tile_.out_offset(p_);
    for (int m = 0; m < tile_.rows; ++m) {
      bool const empty = visible_keys()[m].empty();
      T const divisor = softmax.divisor(m, sink);
      for (int d = 0; d < p_.head_dim_v; ++d) {
        T const x = m < spoiled ? unknown : empty ? T{0} : o[d * layout_.ld + m] / divisor;
        from_float(x, to[m * p_.out_stride.row + d]);
      }
    }
  }

  void store_lse(OnlineSoftmax<T> const& softmax) const {
    T* const to = static_cast<T*>(p_.lse) + tile_.lse_offset(p_);
    double const sink = this->sink();
    int const existing = tile_.existing(p_), spoiled = CellMap::overflowed(p_) ? existing : 0;
    for (int m = 0; m < tile_.rows; ++m) {
      // A row that sees no key may hold anything in blocks that others see whole.
      bool const empty = visible_keys()[m].empty();
      T const lse = empty ? static_cast<T>(ln2<double> * sink) : softmax.lse(m, sink);
      to[m] = m >= existing ? -infinity<T> : m < spoiled ? unknown : lse;
    }
  }

  /// Between which keys those lie that each row of the tile sees.
  RowRange* visible_keys() const { return reinterpret_cast<RowRange*>(memory_ + layout_.visible); }

  ForwardParams const p_;  // a copy, so that no store may alias it
  MaskFunctions const mask_;
  Queries const tile_;
  int const block_m_, block_n_;
  int const columns_;  // tile_.rows, rounded up to whole vectors
  ForwardScratch const layout_;
  T* const memory_;
};

}  // namespace

ForwardTileFunction forward_tile(DType dtype) {
  switch (dtype) {
    case DType::float16: return ForwardTile<DType::float16>::run;
    case DType::bfloat16: return ForwardTile<DType::bfloat16>::run;
    case DType::float32: return ForwardTile<DType::float32>::run;
    case DType::float64: return ForwardTile<DType::float64>::run;
  }
  return nullptr;
}

}  // namespace flashcute::cpu::FLASHCUTE_CPU_ISA
