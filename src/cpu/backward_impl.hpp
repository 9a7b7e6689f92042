// The backward pass of one tile, compiled once per instruction set as forward_impl.hpp is, in two passes: one over
// tiles of queries for dQ, one over tiles of keys for dK and dV. (The gradients of sinks are a third, over heads.) Each
// of the two recomputes P from the LSE. So one task sums every element of a gradient, in one order: the result does not
// depend on the number of threads.
//
//     P = exp(scale Q K^T - LSE)     dS = P * (dO V^T - delta)     delta = rowsum(dO * O) - dLSE
//     dQ = scale dS K                dK = scale dS^T Q             dV = P^T dO
//
// The passes mirror each other. A tile's rows of X (Q or K) and Y (dO or V) are in vector lanes; blocks of the other
// side, B_X (K or Q) and B_Y (V or dO), are read in place: dX^T = B_X^T dS, dY^T = B_Y^T P.
#pragma once

#include "cpu/backward_isa.hpp"
#include "cpu/block.hpp"
#include "flashcute/core/constants.hpp"

namespace flashcute::cpu::FLASHCUTE_CPU_ISA {
namespace {

/// A value for each query, where queries are columns.
template <class T>
struct PerColumn {
  T const* values;
  [[gnu::always_inline]] Vector<T> at(int, int column) const { return load(values + column); }
};

/// The same where queries are rows.
template <class T>
struct PerRow {
  T const* values;
  [[gnu::always_inline]] Vector<T> at(int row, int) const { return broadcast(values[row]); }
};

/// P = exp2(S - LSE), where S = A B diag(factor) in units of log2. P is limited to 1, which rounding errors of large
/// scores can exceed. NaN stays NaN.
template <class T, class PerQuery>
struct Probabilities {
  T* p;
  int64_t ld;
  T const* factor;
  PerQuery lse;

  [[gnu::always_inline]] void operator()(int row, int column, Vector<T> sum) const {
    Vector<T> const x = sum * load(factor + column) - lse.at(row, column);
    store(p + row * ld + column, exp2<T>(x > Vector<T>{} ? Vector<T>{} : x));
  }
};

/// dS = P * (dP - delta), where dP = A B.
template <class T, class PerQuery>
struct ScoreGradients {
  T const* p;
  T* ds;
  int64_t ld;
  PerQuery delta;

  [[gnu::always_inline]] void operator()(int row, int column, Vector<T> sum) const {
    store(ds + row * ld + column, load(p + row * ld + column) * (sum - delta.at(row, column)));
  }
};

template <DType dtype>
class BackwardTile {
  using Element = typename ElementOf<dtype>::type;
  using T = typename ElementOf<dtype>::Accumulator;

 public:
  static void run_queries(BackwardConfig const& config, MaskFunctions const& mask, BackwardParams const& params,
                          int64_t index, void* memory) {
    Queries const tile = Queries::at(params.forward, index, config.block_m);
    if (tile.rows == 0) return;  // a slot that no sequence needs
    BackwardTile{config, mask, params, BackwardPass::queries, tile.rows, memory}.compute(tile);
  }

  static void run_keys(BackwardConfig const& config, MaskFunctions const& mask, BackwardParams const& params,
                       int64_t index, void* memory) {
    Keys const tile = Keys::at(params.forward, index, config.block_n);
    if (tile.rows == 0) return;
    BackwardTile{config, mask, params, BackwardPass::keys, tile.rows, memory}.compute(tile);
  }

 private:
  BackwardTile(BackwardConfig const& config, MaskFunctions const& mask, BackwardParams const& params, BackwardPass pass,
               int rows, void* memory)
      : p_{params},
        f_{p_.forward},
        mask_{mask},
        block_m_{config.block_m},
        block_n_{config.block_n},
        lanes_in_use_{rows},
        columns_{ceil_div(rows, lanes<T>) * lanes<T>},
        layout_{BackwardScratch::of(config, pass)},
        memory_{static_cast<T*>(memory)},
        dx_factor_{split_scale(p_.forward.scale)} {}

  /// delta and dQ of a tile of query rows.
  void compute(Queries const& tile) const {
    int const batch = tile.entry.batch, first_query = tile.entry.first_query, first_key = tile.entry.first_key;
    load_tile(at(f_.q, f_.q_stride, batch, tile.head, first_query + tile.row0), f_.q_stride,
              at(p_.dout, p_.dout_stride, batch, tile.head, first_query + tile.row0), p_.dout_stride);
    T* const lse = memory_ + layout_.lse;
    T* const delta = memory_ + layout_.delta;
    compute_delta(tile, static_cast<T*>(p_.delta) + tile.lse_offset(f_));
    load_per_query(static_cast<T const*>(f_.lse) + tile.lse_offset(f_), log2_e<double>, tile.rows, columns_, lse);
    load_per_query(static_cast<T const*>(p_.delta) + tile.lse_offset(f_), dx_factor_.before, tile.rows, columns_,
                   delta);
    Totals<T> dq = totals(layout_.dx, layout_.dx_totals, layout_.dx_errors, f_.head_dim);

    RowRange* const visible_keys = this->visible_keys();
    mask_.keys_of_queries(tile.row0, tile.rows, tile.sequence(f_), visible_keys);
    CellMap const map = tile.sequence(f_).by_key();
    mask_.kv_range(tile, f_, block_n_).for_each_backward([&](int n, auto partial) {
      int const key0 = n * block_n_;
      int const keys = min_of(block_n_, tile.sequence(f_).keys() - key0);  // nothing beyond the sequence is touched
      auto const visible = [=](int r, int c) { return visible_keys[c].has(key0 + r); };
      Hidden const hidden{map, key0, tile.row0};
      RowMajor<T> const k = load_block(at(f_.k, f_.k_stride, batch, tile.kv_head, first_key + key0), f_.k_stride.row,
                                       keys, f_.head_dim, memory_ + layout_.block_x);
      RowMajor<T> const v = load_block(at(f_.v, f_.v_stride, batch, tile.kv_head, first_key + key0), f_.v_stride.row,
                                       keys, f_.head_dim_v, memory_ + layout_.block_y);
      compute_scores(k, v, keys, PerColumn<T>{lse}, PerColumn<T>{delta}, partial, visible, hidden);
      add_product(k, keys, f_.head_dim, layout_.ds, layout_.dx, partial, visible, hidden);  // dQ^T += K^T dS^T
      if (n > 0 && n % blocks_per_total == 0) dq.add();
    });
    dq.finish();
    store_transposed(layout_.dx, f_.head_dim, dx_factor_.after, p_.dq, p_.dq_stride, batch, tile.head,
                     first_query + tile.row0, tile.existing(f_));
  }

  /// dK and dV of a tile of keys, summed over the query heads of the group.
  void compute(Keys const& tile) const {
    int const batch = tile.entry.batch, first_query = tile.entry.first_query, first_key = tile.entry.first_key;
    load_tile(at(f_.k, f_.k_stride, batch, tile.kv_head, first_key + tile.row0), f_.k_stride,
              at(f_.v, f_.v_stride, batch, tile.kv_head, first_key + tile.row0), f_.v_stride);
    T* const lse = memory_ + layout_.lse;
    T* const delta = memory_ + layout_.delta;
    int const group = f_.heads / f_.kv_heads;
    Totals<T> dk = totals(layout_.dx, layout_.dx_totals, layout_.dx_errors, f_.head_dim);
    Totals<T> dv = totals(layout_.dy, layout_.dy_totals, layout_.dy_errors, f_.head_dim_v);
    RowRange* const visible_keys = this->visible_keys();
    int blocks = 0;
    auto range = mask_.query_range(tile, f_, block_m_);
    for (int head = tile.kv_head * group; head < (tile.kv_head + 1) * group; ++head) {
      CellMap const map = tile.sequence(f_, head).by_query();
      range.for_each([&](int m, auto partial) {
        int const row0 = m * block_m_;
        int const rows = min_of(block_m_, tile.sequence(f_).rows() - row0);
        if constexpr (partial.value) mask_.keys_of_queries(row0, rows, tile.sequence(f_, head), visible_keys);
        auto const visible = [=, key0 = tile.row0](int r, int c) { return visible_keys[r].has(key0 + c); };
        Hidden const hidden{map, row0, tile.row0};
        RowMajor<T> const q = load_block(at(f_.q, f_.q_stride, batch, head, first_query + row0), f_.q_stride.row, rows,
                                         f_.head_dim, memory_ + layout_.block_x);
        RowMajor<T> const dout = load_block(at(p_.dout, p_.dout_stride, batch, head, first_query + row0),
                                            p_.dout_stride.row, rows, f_.head_dim_v, memory_ + layout_.block_y);
        int64_t const first = lse_offset(f_, batch, head) + first_query + row0;
        load_per_query(static_cast<T const*>(f_.lse) + first, log2_e<double>, rows, rows, lse);
        load_per_query(static_cast<T const*>(p_.delta) + first, dx_factor_.before, rows, rows, delta);
        if (blocks++ == blocks_per_total) dk.add(), dv.add(), blocks = 1;
        compute_scores(q, dout, rows, PerRow<T>{lse}, PerRow<T>{delta}, partial, visible, hidden);
        add_product(dout, rows, f_.head_dim_v, layout_.p, layout_.dy, partial, visible, hidden);  // dV^T += dO^T P
        add_product(q, rows, f_.head_dim, layout_.ds, layout_.dx, partial, visible, hidden);      // dK^T += Q^T dS
      });
      range.move_to_next_head();
    }
    dk.finish();
    dv.finish();
    store_transposed(layout_.dx, f_.head_dim, dx_factor_.after, p_.dk, p_.dk_stride, batch, tile.kv_head,
                     first_key + tile.row0, tile.existing(f_));
    store_transposed(layout_.dy, f_.head_dim_v, 1, p_.dv, p_.dv_stride, batch, tile.kv_head, first_key + tile.row0,
                     tile.existing(f_));
  }

  // ---- the mathematics of a block --------------------------------------------------------------------

  /// What a map hides of a block: the map's rows from `row0` on, its columns from `lane0` on.
  struct Hidden {
    CellMap map;
    int row0, lane0;
  };

  /// P and dS of a block. Hidden elements become 0 by selection: they may be NaN.
  template <class PerQuery, class Partial, class Visible>
  void compute_scores(RowMajor<T> block_x, RowMajor<T> block_y, int rows, PerQuery lse, PerQuery delta, Partial,
                      Visible visible, Hidden const& hidden) const {
    T* const p = memory_ + layout_.p;
    T* const ds = memory_ + layout_.ds;
    int64_t const ld = layout_.ld;
    gemm(block_x, rows, memory_ + layout_.x, ld, f_.head_dim, columns_,
         Probabilities<T, PerQuery>{p, ld, memory_ + layout_.factor, lse});
    gemm(block_y, rows, memory_ + layout_.y, ld, f_.head_dim_v, columns_,
         ScoreGradients<T, PerQuery>{p, ds, ld, delta});
    if constexpr (Partial::value) {
      for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < lanes_in_use_; ++c) {
          bool const seen = visible(r, c);
          p[r * ld + c] = seen ? p[r * ld + c] : 0;
          ds[r * ld + c] = seen ? ds[r * ld + c] : 0;
        }
      }
      for_each_hidden<T>(hidden.map, hidden.row0, rows, hidden.lane0, columns_, [&](int r, int c, LaneMask<T> seen) {
        int64_t const at = r * ld + c;
        store(p + at, seen ? load(p + at) : Vector<T>{});
        store(ds + at, seen ? load(ds + at) : Vector<T>{});
      });
    }
  }

  /// sum += block^T weights, without the elements of the block that a lane does not see.
  template <class Partial, class Visible>
  void add_product(RowMajor<T> block, int rows, int width, int64_t weights, int64_t sum, Partial, Visible visible,
                   Hidden const& hidden) const {
    RowMajor<T> const seen = Partial::value ? finite_part(block, rows, width, memory_ + layout_.finite) : block;
    gemm(transpose(seen), width, memory_ + weights, layout_.ld, rows, columns_, Add<T>{memory_ + sum, layout_.ld});
    if constexpr (Partial::value) {
      if (seen.data == block.data) return;
      add_not_finite(block, rows, width, memory_ + weights, memory_ + sum, layout_.ld, lanes_in_use_,
                     [&](int r, int c) { return visible(r, c) && hidden.map.sees(hidden.row0 + r, hidden.lane0 + c); });
    }
  }

  /// delta of a tile of queries, to `to`.
  void compute_delta(Queries const& tile, T* to) const {
    T* const out = memory_ + layout_.out_row;
    T* const dout = memory_ + layout_.dout_row;
    int const width = f_.head_dim_v;
    int const padded = ceil_div(width, lanes<T>) * lanes<T>;
    for (int i = width; i < padded; ++i) out[i] = dout[i] = 0;
    int const batch = tile.entry.batch, first = tile.entry.first_query + tile.row0;
    int const existing = tile.existing(f_);
    for (int m = existing; m < tile.rows; ++m) to[m] = 0;  // for the gradient of the sink
    for (int m = 0; m < existing; ++m) {
      widen(at(f_.out, f_.out_stride, batch, tile.head, first + m), out, width);
      widen(at(p_.dout, p_.dout_stride, batch, tile.head, first + m), dout, width);
      Vector<T> products = {};
      for (int i = 0; i < padded; i += lanes<T>) products += load(out + i) * load(dout + i);
      T sum = 0;
      for (int i = 0; i < lanes<T>; ++i) sum += products[i];
      to[m] = sum - dlse(tile, m);
    }
  }

  T dlse(Queries const& tile, int m) const {
    if (p_.dlse == nullptr) return 0;
    int const row = tile.entry.first_query + tile.row0 + m;
    return static_cast<T const*>(p_.dlse)[row_offset(p_.dlse_stride, tile.entry.batch, tile.head, row)];
  }

  // ---- from and to the tensors -----------------------------------------------------------------------

  /// Loads X^T, the second part of the scores' factor (scale and log2(e)) and Y^T, and clears the sums.
  void load_tile(Element const* x, Strides const& x_stride, Element const* y, Strides const& y_stride) const {
    T* const factor = memory_ + layout_.factor;
    ScoreFactor<T> const score_factor{f_.scale * log2_e<double>};
    auto const before = [&](int r) {
      SplitFactor<T> const f = score_factor.split(x + r * x_stride.row, f_.head_dim);
      factor[r] = f.after;
      return f.before;
    };
    load_transposed(x, x_stride.row, lanes_in_use_, f_.head_dim, before, memory_ + layout_.x, layout_.ld, columns_);
    for (int r = lanes_in_use_; r < columns_; ++r) factor[r] = 0;
    load_transposed(
        y, y_stride.row, lanes_in_use_, f_.head_dim_v, [&](int) { return dx_factor_.before; }, memory_ + layout_.y,
        layout_.ld, columns_);
    clear(memory_ + layout_.dx, f_.head_dim, layout_.ld, columns_);
    clear(memory_ + layout_.dy, f_.head_dim_v, layout_.ld, columns_);
  }

  Totals<T> totals(int64_t sums, int64_t totals, int64_t errors, int rows) const {
    return {memory_ + sums, memory_ + totals, memory_ + errors, rows, layout_.ld, columns_};
  }

  /// The scale of dQ and dK in two parts. The first is multiplied into Y and delta, and so into dS: then sums do not
  /// overflow that a scale below 1 would bring back into range. It takes no more than half of the range of exponents,
  /// or dS would lose digits.
  static SplitFactor<T> split_scale(double scale) {
    int exponent;
    __builtin_frexp(scale, &exponent);
    exponent = max_of(min_of(exponent, 0), std_::numeric_limits<T>::min_exponent / 2);
    return {static_cast<T>(__builtin_ldexp(1, exponent)), static_cast<T>(__builtin_ldexp(scale, -exponent))};
  }

  void load_per_query(T const* from, double factor, int count, int padded, T* to) const {
    for (int m = 0; m < count; ++m) to[m] = static_cast<T>(factor) * from[m];
    for (int m = count; m < padded; ++m) to[m] = 0;
  }

  /// Rows from `existing` on get 0: their lanes may hold anything. Where a map is wrong, the others get NaN.
  void store_transposed(int64_t sum, int width, double factor, void* base, Strides const& stride, int batch, int head,
                        int row0, int existing) const {
    Element* const to = static_cast<Element*>(base) + row_offset(stride, batch, head, row0);
    if (CellMap::overflowed(f_)) factor = __builtin_nan("");
    for (int r = 0; r < lanes_in_use_; ++r) {
      for (int i = 0; i < width; ++i) {
        T const x = r < existing ? static_cast<T>(factor) * memory_[sum + i * layout_.ld + r] : T{0};
        from_float(x, to[r * stride.row + i]);
      }
    }
  }

  Element const* at(void const* base, Strides const& stride, int batch, int head, int row) const {
    return static_cast<Element const*>(base) + row_offset(stride, batch, head, row);
  }

  /// Which keys each query of the tile sees; of a tile of keys, each query of the current block.
  RowRange* visible_keys() const { return reinterpret_cast<RowRange*>(memory_ + layout_.visible); }

  BackwardParams const p_;  // a copy, so that no store may alias it
  ForwardParams const& f_;
  MaskFunctions const mask_;
  int const block_m_, block_n_;
  int const lanes_in_use_;  // the tile's rows
  int const columns_;       // the same, rounded up to whole vectors
  BackwardScratch const layout_;
  T* const memory_;
  SplitFactor<T> const dx_factor_;
};

/// The gradient of a head's sink: -sum(exp(sink - LSE) delta), in the order of its queries.
template <DType dtype>
void sink_gradient(BackwardConfig const&, MaskFunctions const& mask, BackwardParams const& p, int64_t head, void*) {
  using Element = typename ElementOf<dtype>::type;
  using T = typename ElementOf<dtype>::Accumulator;
  ForwardParams const& f = p.forward;
  double const sink = sink_of<Element>(f, static_cast<int>(head));
  double sum = 0;
  for (int batch = 0; batch < f.batch; ++batch) {
    int64_t const first = lse_offset(f, batch, static_cast<int>(head));
    int const rows = f.sequences.packed() ? f.seqlen_q : BatchSequence::Entry::of(f, batch).queries;
    for (int row = 0; row < rows; ++row) {
      auto const lse = static_cast<double>(static_cast<T const*>(f.lse)[first + row]);
      // Below every number: the row does not exist, all scores that it sees are so, or the sink is none.
      if (lse == -__builtin_inf() || sink == -__builtin_inf()) continue;
      double const weight = __builtin_exp(sink - lse);
      double term = weight * static_cast<double>(static_cast<T const*>(p.delta)[first + row]);
      if (term != term) {
        // Where a row does not exist, memory may hold anything; where it sees no key, delta is -dLSE, whatever dO is.
        auto const entry = BatchSequence::Entry::of_row(f, batch, row);
        AnySequence const sequence(f, entry, static_cast<int>(head));
        RowRange keys;
        mask.keys_of_queries(row - entry.first_query, 1, sequence, &keys);
        if (row - entry.first_query >= sequence.rows()) {
          term = 0;
        } else if (keys.empty()) {
          int64_t const at = row_offset(p.dlse_stride, batch, head, row);
          term = p.dlse == nullptr ? 0 : -static_cast<double>(static_cast<T const*>(p.dlse)[at]);
          term *= weight;  // NaN where the sink makes it so
        }
      }
      sum -= term;
    }
  }
  if (f.sink.float32) {
    static_cast<float*>(p.dsink)[head] = static_cast<float>(sum);
  } else {
    from_float(static_cast<T>(sum), static_cast<Element*>(p.dsink)[head]);
  }
}

template <DType dtype>
BackwardTileFunction backward_tile_of(BackwardPass pass) {
  if (pass == BackwardPass::sink) return sink_gradient<dtype>;
  return pass == BackwardPass::queries ? BackwardTile<dtype>::run_queries : BackwardTile<dtype>::run_keys;
}

}  // namespace

BackwardTileFunction backward_tile(DType dtype, BackwardPass pass) {
  switch (dtype) {
    case DType::float16: return backward_tile_of<DType::float16>(pass);
    case DType::bfloat16: return backward_tile_of<DType::bfloat16>(pass);
    case DType::float32: return backward_tile_of<DType::float32>(pass);
    case DType::float64: return backward_tile_of<DType::float64>(pass);
  }
  return nullptr;
}

}  // namespace flashcute::cpu::FLASHCUTE_CPU_ISA
