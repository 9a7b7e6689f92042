// Problems for tests of the CPU backend: tensors in storage with gaps and poison around them, and a naive
// reference that shares nothing with the backend: no tiles, no online softmax, no mask policies.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu/dispatch.hpp"
#include "support/map_problem.hpp"
#include "support/mask_definition.hpp"

namespace flashcute::testing {

using cpu::Isa;
using std::int64_t;

inline constexpr double inf = std::numeric_limits<double>::infinity();
inline constexpr double nan = std::numeric_limits<double>::quiet_NaN();
inline constexpr DType all_dtypes[] = {DType::float16, DType::bfloat16, DType::float32, DType::float64};
inline std::vector<MaskKind> const all_masks = [] {
  std::vector<MaskKind> all;
  for (auto const& row : EnumTable<MaskKind>::rows) all.push_back(row.value);
  return all;
}();

inline std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (Isa const isa : cpu::all_isas) {
    if (cpu::is_available(isa)) isas.push_back(isa);
  }
  return isas;
}

// ---- elements, read and written without the library's conversions ------------------------------------

inline double get(DType t, void const* p) {
  uint16_t bits;
  float single;
  double value;
  switch (t) {
    case DType::float64: std::memcpy(&value, p, 8); return value;
    case DType::float32: std::memcpy(&single, p, 4); return single;
    case DType::bfloat16: {
      std::memcpy(&bits, p, 2);
      uint32_t const wide = static_cast<uint32_t>(bits) << 16;
      std::memcpy(&single, &wide, 4);
      return single;
    }
    case DType::float16: break;
  }
  std::memcpy(&bits, p, 2);
  double const sign = bits & 0x8000 ? -1 : 1;
  int const exponent = (bits >> 10) & 31;
  int const fraction = bits & 1023;
  if (exponent == 31) return fraction != 0 ? nan : sign * inf;
  return exponent == 0 ? sign * std::ldexp(fraction, -24) : sign * std::ldexp(1024 + fraction, exponent - 25);
}

/// Writes x cut (not rounded: inputs need no care) to the type.
inline void set(DType t, void* p, double x) {
  float const single = static_cast<float>(x);
  uint16_t bits = 0;
  switch (t) {
    case DType::float64: std::memcpy(p, &x, 8); return;
    case DType::float32: std::memcpy(p, &single, 4); return;
    case DType::bfloat16: {
      uint32_t wide;
      std::memcpy(&wide, &single, 4);
      bits = static_cast<uint16_t>(wide >> 16);
      break;
    }
    case DType::float16: {
      int exponent;
      double const magnitude = std::fabs(x);
      double const fraction = std::frexp(magnitude, &exponent);  // in [1/2, 1)
      if (x != x) {
        bits = 0x7e00;
      } else if (magnitude >= 65536) {
        bits = 0x7c00;
      } else if (magnitude >= 0x1p-14) {
        bits = static_cast<uint16_t>(((exponent + 14) << 10) + (static_cast<int>(fraction * 2048) - 1024));
      } else {
        bits = static_cast<uint16_t>(magnitude * 0x1p24);
      }
      if (std::signbit(x)) bits |= 0x8000;
      break;
    }
  }
  std::memcpy(p, &bits, 2);
}

// ---- a problem: tensors in storage with gaps ---------------------------------------------------------

struct Shape {
  DType dtype = DType::float32;
  int head_dim = 64;
  int head_dim_v = head_dim;
  int batch = 1, heads = 2, kv_heads = 2;
  int seqlen_q = 64, seqlen_k = 64;
  MaskKind mask = MaskKind::full;
  double scale = 0.25;
  int block_m = 64, block_n = 64;
  int causal_offset = 0, window_offset = -40;
  MapProblem const* map = nullptr;  // of mask `mapped`; none shows everything

  /// Bottom-right alignment, as attention uses it.
  Shape& bottom_right() {
    causal_offset = seqlen_k - seqlen_q;
    window_offset = causal_offset - 40;
    return *this;
  }
};

inline std::string describe(Shape const& s) {
  return std::string(name_of(s.dtype)) + " d" + std::to_string(s.head_dim) + " b" + std::to_string(s.batch) + " h" +
         std::to_string(s.heads) + "/" + std::to_string(s.kv_heads) + " q" + std::to_string(s.seqlen_q) + " k" +
         std::to_string(s.seqlen_k) + " " + name_of(s.mask) + " offset " + std::to_string(s.causal_offset) +
         " window " + std::to_string(s.window_offset) + " m" + std::to_string(s.block_m) + " n" +
         std::to_string(s.block_n) + (s.map != nullptr ? " with a map" : "");
}

enum class Order { bshd, bhsd };

struct Placement {
  Order order = Order::bshd;
  int row_gap = 0;  // unused elements between rows
  int offset = 0;   // unused elements before the first
  int after = 64;   // rows' worth of unused elements behind the last
};

/// (batch, rows, heads, d) elements in storage whose every other byte is `filler`. 0xff makes NaN in
/// all types: whoever reads what is not his gets NaN.
class Tensor {
 public:
  Tensor(DType dtype, int batch, int rows, int heads, int d, Placement const& at = {}, unsigned char filler = 0xff)
      : dtype_{dtype}, batch_{batch}, rows_{rows}, heads_{heads}, d_{d}, offset_{at.offset}, filler_{filler} {
    int64_t const line = d + at.row_gap;
    stride_ = at.order == Order::bshd ? Strides{rows * heads * line, heads * line, line}
                                      : Strides{rows * heads * line, line, rows * line};
    int64_t const elements = offset_ + static_cast<int64_t>(batch) * rows * heads * line + at.after * line;
    bytes_.assign(static_cast<size_t>(elements * size_of(dtype)), filler);
  }

  Strides stride() const { return stride_; }
  void set_stride(Strides s) { stride_ = s; }
  void* data() { return bytes_.data() + offset_ * size_of(dtype_); }
  std::vector<unsigned char> const& bytes() const { return bytes_; }

  double at(int b, int row, int h, int i) const { return get(dtype_, bytes_.data() + position(b, row, h, i)); }
  void put(int b, int row, int h, int i, double x) { set(dtype_, bytes_.data() + position(b, row, h, i), x); }

  template <class F>
  void fill(F&& value) {
    for_each([&](int b, int row, int h, int i) { put(b, row, h, i, value()); });
  }

  void fill_row(int row, double x) {
    for (int b = 0; b < batch_; ++b) {
      for (int h = 0; h < heads_; ++h) {
        for (int i = 0; i < d_; ++i) put(b, row, h, i, x);
      }
    }
  }

  bool gaps_untouched() const {
    std::vector<unsigned char> rest = bytes_;
    auto const size = static_cast<size_t>(size_of(dtype_));
    for_each([&](int b, int row, int h, int i) { std::memset(rest.data() + position(b, row, h, i), filler_, size); });
    for (unsigned char const byte : rest) {
      if (byte != filler_) return false;
    }
    return true;
  }

 private:
  template <class F>
  void for_each(F&& f) const {
    for (int b = 0; b < batch_; ++b) {
      for (int row = 0; row < rows_; ++row) {
        for (int h = 0; h < heads_; ++h) {
          for (int i = 0; i < d_; ++i) f(b, row, h, i);
        }
      }
    }
  }

  size_t position(int b, int row, int h, int i) const {
    int64_t const element = offset_ + b * stride_.batch + row * stride_.row + h * stride_.head + i;
    return static_cast<size_t>(element * size_of(dtype_));
  }

  DType dtype_;
  int batch_, rows_, heads_, d_;
  int64_t offset_;
  unsigned char filler_;
  Strides stride_{};
  std::vector<unsigned char> bytes_;
};

inline constexpr unsigned char untouched = 0xa5;

DType lse_type(DType t) { return t == DType::float64 ? DType::float64 : DType::float32; }

struct Problem {
  Shape shape;
  Tensor q, k, v;

  explicit Problem(Shape const& s, Placement const& at = {}, unsigned seed = std::random_device{}())
      : shape{s},
        q{s.dtype, s.batch, s.seqlen_q, s.heads, s.head_dim, at},
        k{s.dtype, s.batch, s.seqlen_k, s.kv_heads, s.head_dim, at},
        v{s.dtype, s.batch, s.seqlen_k, s.kv_heads, s.head_dim_v, at} {
    std::mt19937 random{seed};
    std::normal_distribution<double> normal;
    for (Tensor* const t : {&q, &k, &v}) t->fill([&] { return normal(random); });
  }
};

struct Result {
  Tensor out, lse;
};

inline ForwardConfig config_of(Shape const& s) {
  ForwardConfig c;
  c.dtype = s.dtype;
  c.head_dim = s.head_dim;
  c.head_dim_v = s.head_dim_v;
  c.block_m = s.block_m;
  c.block_n = s.block_n;
  return c;
}

inline ForwardParams params_of(Problem& problem) {
  Shape const& s = problem.shape;
  ForwardParams p{};
  p.q = problem.q.data();
  p.k = problem.k.data();
  p.v = problem.v.data();
  p.q_stride = problem.q.stride();
  p.k_stride = problem.k.stride();
  p.v_stride = problem.v.stride();
  p.scale = s.scale;
  p.scale_log2 = nan;  // the GPU's: whoever uses it here is found out
  p.batch = s.batch;
  p.heads = s.heads;
  p.kv_heads = s.kv_heads;
  p.seqlen_q = s.seqlen_q;
  p.seqlen_k = s.seqlen_k;
  p.head_dim = s.head_dim;
  p.head_dim_v = s.head_dim_v;
  p.causal_offset = s.causal_offset;
  p.window_offset = s.window_offset;
  if (s.map != nullptr) p.map = s.map->described();
  return p;
}

inline Result run(Isa isa, Problem& problem, int threads = 2, Placement const& at = {}) {
  Shape const& s = problem.shape;
  Result r{{s.dtype, s.batch, s.seqlen_q, s.heads, s.head_dim_v, at, untouched},
           {lse_type(s.dtype), s.batch, s.seqlen_q, s.heads, 1, {.order = Order::bhsd}, untouched}};
  ForwardParams p = params_of(problem);
  p.out = r.out.data();
  p.lse = r.lse.data();
  p.out_stride = r.out.stride();
  cpu::forward_with(isa, threads, config_of(s), {s.mask}, p);
  return r;
}

// ---- the reference -----------------------------------------------------------------------------------

struct Reference {
  std::vector<long double> out;  // (batch, seqlen_q, heads, d)
  std::vector<long double> lse;  // (batch, seqlen_q, heads)
  Shape shape;

  size_t row(int b, int i, int h) const { return (static_cast<size_t>(b) * shape.seqlen_q + i) * shape.heads + h; }
};

/// The rows of one head, one after the other.
inline std::vector<double> rows_of(Tensor const& t, int b, int h, int rows, int d) {
  std::vector<double> all;
  for (int i = 0; i < rows; ++i) {
    for (int e = 0; e < d; ++e) all.push_back(t.at(b, i, h, e));
  }
  return all;
}

/// The keys that query i of a head sees.
inline std::vector<int> keys_of(Shape const& s, int b, int h, int i) {
  std::vector<int> keys;
  definition::MaskProblem mask{s.seqlen_k, s.causal_offset, s.window_offset};
  for (int j = 0; j < s.seqlen_k; ++j) {
    mask.map_shows = s.map == nullptr || s.map->shows(b, h, i, j);
    if (definition::sees(s.mask, i, j, mask)) keys.push_back(j);
  }
  return keys;
}

inline Reference reference(Problem const& problem) {
  Shape const& s = problem.shape;
  Reference r{{}, {}, s};
  size_t const rows = static_cast<size_t>(s.batch) * s.seqlen_q * s.heads;
  r.out.assign(rows * s.head_dim_v, 0);
  r.lse.assign(rows, -inf);
  std::vector<long double> score(s.seqlen_k), q(s.head_dim);
  for (int b = 0; b < s.batch; ++b) {
    for (int h = 0; h < s.heads; ++h) {
      int const kv = h * s.kv_heads / s.heads;
      std::vector<double> const k = rows_of(problem.k, b, kv, s.seqlen_k, s.head_dim),
                                v = rows_of(problem.v, b, kv, s.seqlen_k, s.head_dim_v);
      for (int i = 0; i < s.seqlen_q; ++i) {
        std::vector<int> const keys = keys_of(s, b, h, i);
        if (keys.empty()) continue;
        for (int e = 0; e < s.head_dim; ++e) q[e] = problem.q.at(b, i, h, e);
        long double top = -inf;
        bool bad = false;  // NaN or +inf among the scores
        for (int const j : keys) {
          long double dot = 0;
          for (int e = 0; e < s.head_dim; ++e) dot += q[e] * k[static_cast<size_t>(j) * s.head_dim + e];
          score[j] = dot * s.scale;
          bad = bad || std::isnan(score[j]) || score[j] == inf;
          top = std::max(top, score[j]);
        }
        bool const nothing = top == -inf;
        long double sum = 0;
        long double* const out = r.out.data() + r.row(b, i, h) * s.head_dim_v;
        for (int const j : keys) {
          long double const p = nothing ? 0 : std::exp(score[j] - top);
          sum += p;
          for (int e = 0; e < s.head_dim_v; ++e) out[e] += p * v[static_cast<size_t>(j) * s.head_dim_v + e];
        }
        for (int e = 0; e < s.head_dim_v; ++e) out[e] = bad || nothing ? nan : out[e] / sum;
        r.lse[r.row(b, i, h)] = bad ? nan : nothing ? -inf : top + std::log(sum);
      }
    }
  }
  return r;
}

/// Half a unit in the last place of the type, relative.
inline double rounding(DType t) {
  switch (t) {
    case DType::float16: return 0x1p-11;
    case DType::bfloat16: return 0x1p-8;
    case DType::float32: return 0x1p-24;
    case DType::float64: return 0x1p-53;
  }
  return 0;
}

inline bool close(double got, long double want, double tolerance) {
  if (std::isnan(want)) return std::isnan(got);
  if (std::isinf(want)) return got == want;
  return std::fabs(got - want) <= tolerance;  // false for NaN
}

/// fp32 arithmetic is allowed 1e-5 of the largest output (fp64: 2e-14), and the final rounding comes on top.
inline void expect_matches(Result const& r, Reference const& want, double loosen = 1) {
  Shape const& s = want.shape;
  double const arithmetic = loosen * (s.dtype == DType::float64 ? 2e-14 : 1e-5);
  long double largest = 1e-30;
  for (long double const x : want.out) {
    if (std::isfinite(x)) largest = std::max(largest, std::fabs(x));
  }
  for (int b = 0; b < s.batch; ++b) {
    for (int i = 0; i < s.seqlen_q; ++i) {
      for (int h = 0; h < s.heads; ++h) {
        size_t const row = want.row(b, i, h);
        for (int e = 0; e < s.head_dim_v; ++e) {
          long double const x = want.out[row * s.head_dim_v + e];
          double const smallest = s.dtype == DType::float16 ? 0x1p-25 : 0;
          double const tolerance =
              static_cast<double>(arithmetic * largest + rounding(s.dtype) * 1.01 * std::fabs(x)) + smallest;
          ASSERT_TRUE(close(r.out.at(b, i, h, e), x, tolerance))
              << "out[" << b << ", " << i << ", " << h << ", " << e << "] = " << r.out.at(b, i, h, e) << ", expected "
              << x << " within " << tolerance;
        }
        long double const lse = want.lse[row];
        double const tolerance = static_cast<double>(arithmetic * std::max(1.0L, std::fabs(lse)));
        ASSERT_TRUE(close(r.lse.at(b, i, h, 0), lse, tolerance))
            << "lse[" << b << ", " << h << ", " << i << "] = " << r.lse.at(b, i, h, 0) << ", expected " << lse;
      }
    }
  }
  ASSERT_TRUE(r.out.gaps_untouched()) << "wrote to memory between or behind the output rows";
  ASSERT_TRUE(r.lse.gaps_untouched()) << "wrote to memory behind the LSE";
}

inline void check(Problem& problem, Placement const& out = {}, double loosen = 1) {
  Reference const want = reference(problem);
  for (Isa const isa : available_isas()) {
    SCOPED_TRACE(describe(problem.shape) + " on " + name_of(isa));
    ASSERT_NO_FATAL_FAILURE(expect_matches(run(isa, problem, 2, out), want, loosen));
  }
}

inline bool same_bits(Result const& a, Result const& b) {
  return a.out.bytes() == b.out.bytes() && a.lse.bytes() == b.lse.bytes();
}

/// Calls f(shape) with masks by element: tiles that fill words of a map, and that do not; a mask of all heads, and one
/// of each. A query sees no more than 1,101 keys, up to `last` after its own number.
template <class F>
void for_each_mapped_shape(std::initializer_list<int> lasts, F const& f) {
  for (int const heads : {1, 2}) {
    MapProblem const map = MapProblem::random(1, heads, 203, 330, 7);
    for (DType const dtype : {DType::float32, DType::float64, DType::bfloat16}) {
      for (auto const& [block_m, block_n] : {std::pair{64, 128}, {64, 64}, {48, 80}, {112, 16}, {144, 256}}) {
        for (int const last : lasts) {
          f(Shape{.dtype = dtype,
                  .head_dim = 8,
                  .heads = 2,
                  .kv_heads = 1,
                  .seqlen_q = 203,
                  .seqlen_k = 330,
                  .mask = MaskKind::mapped,
                  .block_m = block_m,
                  .block_n = block_n,
                  .causal_offset = last,
                  .window_offset = last - 1100,
                  .map = &map});
        }
      }
    }
  }
}

/// Values that are no numbers, which some rows of these shapes see.
inline void put_special_values(Problem& problem) {
  problem.k.put(0, 100, 0, 5, nan);
  problem.v.put(0, 130, 0, 7, inf);
  problem.q.put(0, 70, 1, 0, nan);
}

}  // namespace flashcute::testing
