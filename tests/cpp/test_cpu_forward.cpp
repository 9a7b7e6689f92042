// The CPU backend's forward pass against a naive reference that shares nothing with it: no tiles, no
// online softmax, no mask policies. Every test names the failure that it guards against.
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <mutex>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/dispatch.hpp"
#include "cpu/thread_pool.hpp"
#include "environment.hpp"
#include "flashcute/error.hpp"

namespace {

using namespace flashcute;
using cpu::Isa;
using std::int64_t;

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();
constexpr DType all_dtypes[] = {DType::float16, DType::bfloat16, DType::float32, DType::float64};
constexpr MaskKind all_masks[] = {MaskKind::full, MaskKind::causal};

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (Isa const isa : cpu::all_isas) {
    if (cpu::is_available(isa)) isas.push_back(isa);
  }
  return isas;
}

// ---- elements, read and written without the library's conversions ------------------------------------

double get(DType t, void const* p) {
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
void set(DType t, void* p, double x) {
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
  int batch = 1, heads = 2, kv_heads = 2;
  int seqlen_q = 64, seqlen_k = 64;
  MaskKind mask = MaskKind::full;
  double scale = 0.25;
  int block_m = 64, block_n = 64;
  int causal_offset = 0;

  /// Bottom-right alignment, as attention uses it.
  Shape& bottom_right() {
    causal_offset = seqlen_k - seqlen_q;
    return *this;
  }
};

std::string describe(Shape const& s) {
  return std::string(name_of(s.dtype)) + " d" + std::to_string(s.head_dim) + " b" + std::to_string(s.batch) + " h" +
         std::to_string(s.heads) + "/" + std::to_string(s.kv_heads) + " q" + std::to_string(s.seqlen_q) + " k" +
         std::to_string(s.seqlen_k) + " " + name_of(s.mask) + " offset " + std::to_string(s.causal_offset) + " m" +
         std::to_string(s.block_m) + " n" + std::to_string(s.block_n);
}

enum class Order { bshd, bhsd };

struct Placement {
  Order order = Order::bshd;
  int row_gap = 0;   // unused elements between rows
  int offset = 0;    // unused elements before the first
  int after = 64;    // rows' worth of unused elements behind the last
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

constexpr unsigned char untouched = 0xa5;

DType lse_type(DType t) { return t == DType::float64 ? DType::float64 : DType::float32; }

struct Problem {
  Shape shape;
  Tensor q, k, v;

  explicit Problem(Shape const& s, Placement const& at = {}, unsigned seed = std::random_device{}())
      : shape{s},
        q{s.dtype, s.batch, s.seqlen_q, s.heads, s.head_dim, at},
        k{s.dtype, s.batch, s.seqlen_k, s.kv_heads, s.head_dim, at},
        v{s.dtype, s.batch, s.seqlen_k, s.kv_heads, s.head_dim, at} {
    std::mt19937 random{seed};
    std::normal_distribution<double> normal;
    for (Tensor* const t : {&q, &k, &v}) t->fill([&] { return normal(random); });
  }
};

struct Result {
  Tensor out, lse;
};

ForwardConfig config_of(Shape const& s) {
  ForwardConfig c;
  c.dtype = s.dtype;
  c.head_dim = s.head_dim;
  c.block_m = s.block_m;
  c.block_n = s.block_n;
  return c;
}

ForwardParams params_of(Problem& problem) {
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
  p.causal_offset = s.causal_offset;
  return p;
}

Result run(Isa isa, Problem& problem, int threads = 2, Placement const& at = {}) {
  Shape const& s = problem.shape;
  Result r{{s.dtype, s.batch, s.seqlen_q, s.heads, s.head_dim, at, untouched},
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

  size_t row(int b, int i, int h) const {
    return (static_cast<size_t>(b) * shape.seqlen_q + i) * shape.heads + h;
  }
};

Reference reference(Problem const& problem) {
  Shape const& s = problem.shape;
  Reference r{{}, {}, s};
  size_t const rows = static_cast<size_t>(s.batch) * s.seqlen_q * s.heads;
  r.out.assign(rows * s.head_dim, 0);
  r.lse.assign(rows, -inf);
  std::vector<long double> score(s.seqlen_k), q(s.head_dim);
  for (int b = 0; b < s.batch; ++b) {
    for (int h = 0; h < s.heads; ++h) {
      int const kv = h * s.kv_heads / s.heads;
      std::vector<double> k, v;
      for (int j = 0; j < s.seqlen_k; ++j) {
        for (int e = 0; e < s.head_dim; ++e) {
          k.push_back(problem.k.at(b, j, kv, e));
          v.push_back(problem.v.at(b, j, kv, e));
        }
      }
      for (int i = 0; i < s.seqlen_q; ++i) {
        int64_t seen = s.seqlen_k;
        if (s.mask == MaskKind::causal) seen = std::min<int64_t>(seen, static_cast<int64_t>(i) + s.causal_offset + 1);
        if (seen <= 0) continue;
        for (int e = 0; e < s.head_dim; ++e) q[e] = problem.q.at(b, i, h, e);
        long double top = -inf;
        bool bad = false;  // NaN or +inf among the scores
        for (int j = 0; j < seen; ++j) {
          long double dot = 0;
          for (int e = 0; e < s.head_dim; ++e) dot += q[e] * k[static_cast<size_t>(j) * s.head_dim + e];
          score[j] = dot * s.scale;
          bad = bad || std::isnan(score[j]) || score[j] == inf;
          top = std::max(top, score[j]);
        }
        bool const nothing = top == -inf;
        long double sum = 0;
        long double* const out = r.out.data() + r.row(b, i, h) * s.head_dim;
        for (int j = 0; j < seen; ++j) {
          long double const p = nothing ? 0 : std::exp(score[j] - top);
          sum += p;
          for (int e = 0; e < s.head_dim; ++e) out[e] += p * v[static_cast<size_t>(j) * s.head_dim + e];
        }
        for (int e = 0; e < s.head_dim; ++e) out[e] = bad || nothing ? nan : out[e] / sum;
        r.lse[r.row(b, i, h)] = bad ? nan : nothing ? -inf : top + std::log(sum);
      }
    }
  }
  return r;
}

/// Half a unit in the last place of the type, relative.
double rounding(DType t) {
  switch (t) {
    case DType::float16: return 0x1p-11;
    case DType::bfloat16: return 0x1p-8;
    case DType::float32: return 0x1p-24;
    case DType::float64: return 0x1p-53;
  }
  return 0;
}

bool close(double got, long double want, double tolerance) {
  if (std::isnan(want)) return std::isnan(got);
  if (std::isinf(want)) return got == want;
  return std::fabs(got - want) <= tolerance;  // false for NaN
}

/// fp32 arithmetic is allowed 1e-5 of the largest output (fp64: 2e-14), and the final rounding comes on top.
void expect_matches(Result const& r, Reference const& want, double loosen = 1) {
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
        for (int e = 0; e < s.head_dim; ++e) {
          long double const x = want.out[row * s.head_dim + e];
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

void check(Problem& problem, Placement const& out = {}, double loosen = 1) {
  Reference const want = reference(problem);
  for (Isa const isa : available_isas()) {
    SCOPED_TRACE(describe(problem.shape) + " on " + name_of(isa));
    ASSERT_NO_FATAL_FAILURE(expect_matches(run(isa, problem, 2, out), want, loosen));
  }
}

bool same_bits(Result const& a, Result const& b) {
  return a.out.bytes() == b.out.bytes() && a.lse.bytes() == b.lse.bytes();
}

// ---- shapes ------------------------------------------------------------------------------------------

// Zero and one rows or keys, lengths around the tile, more queries than keys (rows that see nothing):
// crashes, untouched outputs, NaN in empty rows, keys lost or invented at the end of a sequence.
TEST(CpuForward, EveryPairOfLengths) {
  int const lengths[] = {0, 1, 2, 17, 64, 65, 127, 203};
  for (DType const dtype : all_dtypes) {
    for (MaskKind const mask : all_masks) {
      for (int const seqlen_q : lengths) {
        for (int const seqlen_k : lengths) {
          Problem problem{
              Shape{.dtype = dtype, .head_dim = 40, .seqlen_q = seqlen_q, .seqlen_k = seqlen_k, .mask = mask}
                  .bottom_right()};
          ASSERT_NO_FATAL_FAILURE(check(problem));
        }
      }
    }
  }
}

// A head dim that the register tiles do not divide: columns dropped, or read past the end of the row.
TEST(CpuForward, EveryKindOfHeadDim) {
  for (DType const dtype : all_dtypes) {
    for (MaskKind const mask : all_masks) {
      for (int const d : {1, 2, 3, 5, 7, 8, 13, 40, 64, 72, 104, 128, 200, 255, 256}) {
        Problem problem{Shape{.dtype = dtype,
                              .head_dim = d,
                              .seqlen_q = 67,
                              .seqlen_k = 131,
                              .mask = mask,
                              .scale = 1 / std::sqrt(d)}
                            .bottom_right()};
        ASSERT_NO_FATAL_FAILURE(check(problem));
      }
    }
  }
}

// Tiles whose width is not a multiple of the register tile's, blocks smaller than tiles and the reverse,
// a compiled head dim wider than the tensors': scratch too small or indexed with the wrong stride.
TEST(CpuForward, EveryTile) {
  for (DType const dtype : {DType::float32, DType::float64, DType::bfloat16}) {
    for (int const block_m : {16, 48, 64, 112, 256}) {
      for (int const block_n : {16, 80, 256}) {
        Problem problem{Shape{.dtype = dtype,
                              .head_dim = 24,
                              .seqlen_q = 203,
                              .seqlen_k = 203,
                              .mask = MaskKind::causal,
                              .block_m = block_m,
                              .block_n = block_n}};
        ASSERT_NO_FATAL_FAILURE(check(problem));
      }
    }
  }
  Problem narrow{Shape{.head_dim = 20, .seqlen_q = 70, .seqlen_k = 70}};
  Reference const want = reference(narrow);
  Tensor out{DType::float32, 1, 70, 2, 20};
  ForwardParams p = params_of(narrow);
  p.out = out.data();
  p.out_stride = out.stride();
  ForwardConfig wide = config_of(narrow.shape);
  wide.head_dim = 256;
  for (Isa const isa : available_isas()) {
    cpu::forward_with(isa, 1, wide, {}, p);
    for (int i = 0; i < 70; ++i) {
      for (int e = 0; e < 20; ++e) ASSERT_NEAR(out.at(0, i, 1, e), want.out[want.row(0, i, 1) * 20 + e], 1e-5);
    }
  }
}

// Query heads that read the wrong K/V head, batches that read each other's.
TEST(CpuForward, GroupedHeads) {
  for (int const kv_heads : {1, 2, 3, 6}) {
    Problem problem{
        Shape{.head_dim = 16, .batch = 3, .heads = 6, .kv_heads = kv_heads, .seqlen_q = 33, .seqlen_k = 50}};
    ASSERT_NO_FATAL_FAILURE(check(problem));
  }
}

// The causal diagonal in the wrong place: top-left and bottom-right alignment, offsets that hide all keys
// from some or all rows or show all, at the limits of int32 too.
TEST(CpuForward, CausalOffsets) {
  for (int const offset : {-1000, -65, -64, -63, -1, 0, 1, 13, 63, 64, 1000, INT32_MAX, INT32_MIN}) {
    Problem problem{Shape{.head_dim = 8, .seqlen_q = 130, .seqlen_k = 90, .mask = MaskKind::causal,
                          .causal_offset = offset}};
    ASSERT_NO_FATAL_FAILURE(check(problem));
  }
}

// ---- memory ------------------------------------------------------------------------------------------

// Strides other than those of a packed tensor, bases aligned to one element only: wrong or faulting
// accesses. What lies between the rows is NaN, so reading it shows.
TEST(CpuForward, StridesAndAlignment) {
  for (DType const dtype : all_dtypes) {
    for (Order const order : {Order::bshd, Order::bhsd}) {
      for (int const gap : {0, 1, 9}) {
        Placement const at{.order = order, .row_gap = gap, .offset = 1};
        Problem problem{Shape{.dtype = dtype, .head_dim = 33, .batch = 2, .seqlen_q = 70, .seqlen_k = 77}, at};
        ASSERT_NO_FATAL_FAILURE(check(problem, at));
      }
    }
  }
}

// Expanded tensors, which have stride 0 along batch, head or row.
TEST(CpuForward, StrideZero) {
  Problem problem{Shape{.head_dim = 16, .batch = 3, .heads = 4, .kv_heads = 4, .seqlen_q = 20, .seqlen_k = 30}};
  problem.q.set_stride({0, problem.q.stride().row, problem.q.stride().head});
  problem.k.set_stride({problem.k.stride().batch, problem.k.stride().row, 0});
  problem.v.set_stride({problem.v.stride().batch, 0, problem.v.stride().head});
  check(problem);
}

/// Memory that takes no room until it is touched.
class Reserved {
 public:
  explicit Reserved(size_t bytes) : bytes_{bytes} {
    memory_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  ~Reserved() {
    if (ok()) munmap(memory_, bytes_);
  }
  Reserved(Reserved const&) = delete;
  Reserved& operator=(Reserved const&) = delete;

  bool ok() const { return memory_ != MAP_FAILED; }
  char* data() const { return static_cast<char*>(memory_); }

 private:
  void* memory_;
  size_t bytes_;
};

// Offsets beyond 2^31 and 2^32 elements, computed in 32 bits (flash-attention 1311, 772, 2214).
TEST(CpuForward, OffsetsBeyond32Bits) {
  int64_t const far = (int64_t{1} << 31) + 24;
  for (int const which : {0, 1, 2}) {  // the stride that is large: batch, row, head
    int const n = 3, d = 8;
    auto const extent = [&](int i) { return i == which ? far : int64_t{d} * (i == 0 ? 9 : i == 1 ? 3 : 1); };
    Strides const stride{extent(0), extent(1), extent(2)};
    size_t const bytes = static_cast<size_t>(2 * (far * n + 1000));
    Reserved const memory[4] = {Reserved{bytes}, Reserved{bytes}, Reserved{bytes}, Reserved{bytes}};
    for (Reserved const& m : memory) {
      if (!m.ok()) GTEST_SKIP() << "cannot reserve " << bytes << " bytes of address space";
    }
    Shape const shape{.dtype = DType::bfloat16, .head_dim = d, .batch = n, .heads = n, .kv_heads = n, .seqlen_q = n,
                      .seqlen_k = n};
    Problem problem{shape};
    auto const address = [&](int tensor, int b, int row, int h) {
      return memory[tensor].data() + 2 * (b * stride.batch + row * stride.row + h * stride.head);
    };
    auto const for_each_line = [&](auto&& f) {
      for (int b = 0; b < n; ++b) {
        for (int row = 0; row < n; ++row) {
          for (int h = 0; h < n; ++h) f(b, row, h);
        }
      }
    };
    Tensor const* const from[3] = {&problem.q, &problem.k, &problem.v};
    for_each_line([&](int b, int row, int h) {
      for (int t = 0; t < 3; ++t) {
        for (int e = 0; e < d; ++e) set(shape.dtype, address(t, b, row, h) + 2 * e, from[t]->at(b, row, h, e));
      }
    });
    Reference const want = reference(problem);
    ForwardParams p = params_of(problem);
    p.q = memory[0].data();
    p.k = memory[1].data();
    p.v = memory[2].data();
    p.out = memory[3].data();
    p.q_stride = p.k_stride = p.v_stride = p.out_stride = stride;
    for (Isa const isa : available_isas()) {
      for_each_line([&](int b, int row, int h) { std::memset(address(3, b, row, h), 0xff, 2 * d); });
      cpu::forward_with(isa, 1, config_of(shape), {}, p);
      for_each_line([&](int b, int row, int h) {
        for (int e = 0; e < d; ++e) {
          double const got = get(shape.dtype, address(3, b, row, h) + 2 * e);
          ASSERT_NEAR(got, static_cast<double>(want.out[want.row(b, row, h) * d + e]), 0.02) << "stride " << which;
        }
      });
    }
  }
}

// Reading or writing beyond the last element, even without using what is read: the tensors end where
// the accessible memory does.
TEST(CpuForward, StaysInsideItsMemory) {
  size_t const page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  for (DType const dtype : all_dtypes) {
    for (int const d : {1, 3, 40}) {
      Shape const shape{.dtype = dtype, .head_dim = d, .heads = 1, .kv_heads = 1, .seqlen_q = 19, .seqlen_k = 21};
      Problem problem{shape};
      size_t const line = static_cast<size_t>(d * size_of(dtype));
      size_t const sizes[] = {19 * line, 21 * line, 21 * line, 19 * line,
                              19 * static_cast<size_t>(size_of(lse_type(dtype)))};
      Reserved const memory[5] = {Reserved{4 * page}, Reserved{4 * page}, Reserved{4 * page}, Reserved{4 * page},
                                  Reserved{4 * page}};
      char* at[5];
      for (int t = 0; t < 5; ++t) {
        ASSERT_TRUE(memory[t].ok());
        ASSERT_LE(sizes[t], 2 * page);
        mprotect(memory[t].data(), page, PROT_NONE);
        mprotect(memory[t].data() + 3 * page, page, PROT_NONE);
        at[t] = memory[t].data() + 3 * page - sizes[t];
      }
      Tensor* const from[3] = {&problem.q, &problem.k, &problem.v};
      for (int t = 0; t < 3; ++t) std::memcpy(at[t], from[t]->data(), sizes[t]);
      ForwardParams p = params_of(problem);
      p.q = at[0], p.k = at[1], p.v = at[2], p.out = at[3], p.lse = at[4];
      p.q_stride = p.k_stride = p.v_stride = p.out_stride = {0, d, d};
      Reference const want = reference(problem);
      for (Isa const isa : available_isas()) {
        cpu::forward_with(isa, 1, config_of(shape), {}, p);
        double const last = get(dtype, at[3] + sizes[3] - static_cast<size_t>(size_of(dtype)));
        ASSERT_NEAR(last, static_cast<double>(want.out.back()), 0.02);
      }
    }
  }
}

// The LSE is optional: a write through a null pointer, or an output that depends on it.
TEST(CpuForward, WithoutLse) {
  Problem problem{Shape{.seqlen_q = 70}};
  for (Isa const isa : available_isas()) {
    Result const with = run(isa, problem);
    Tensor out{DType::float32, 1, 70, 2, 64, {}, untouched};
    ForwardParams p = params_of(problem);
    p.out = out.data();
    p.out_stride = out.stride();
    cpu::forward_with(isa, 2, config_of(problem.shape), {}, p);
    EXPECT_EQ(out.bytes(), with.out.bytes());
  }
}

// ---- NaN and infinity --------------------------------------------------------------------------------

// NaN and inf in keys and values reach the queries that see them and no others, also within one block:
// 0 * NaN in P V, or NaN surviving an additive mask (flash-attention 1745, FlashInfer 941).
TEST(CpuForward, MaskedPoisonDoesNotLeak) {
  for (DType const dtype : all_dtypes) {
    for (double const poison : {nan, inf, -inf}) {
      for (int const row : {0, 30, 63, 64, 70, 99}) {
        for (bool const in_keys : {false, true}) {
          Problem problem{Shape{.dtype = dtype, .head_dim = 24, .seqlen_q = 100, .seqlen_k = 100,
                                .mask = MaskKind::causal}};
          if (in_keys) {
            problem.k.put(0, row, 0, 5, poison);
          } else {
            problem.v.put(0, row, 0, 5, poison);
            problem.v.put(0, row, 1, 23, poison);
          }
          ASSERT_NO_FATAL_FAILURE(check(problem));
        }
      }
    }
  }
}

// Everything that no query sees is NaN, whole blocks and parts of them; top-left alignment leaves the
// end of a longer K unseen.
TEST(CpuForward, UnseenKeysAndValuesAreNaN) {
  for (DType const dtype : all_dtypes) {
    Problem problem{Shape{.dtype = dtype, .head_dim = 24, .seqlen_q = 70, .seqlen_k = 203, .mask = MaskKind::causal}};
    for (int row = 70; row < 203; ++row) problem.k.fill_row(row, nan), problem.v.fill_row(row, nan);
    Reference const want = reference(problem);
    for (long double const x : want.out) ASSERT_TRUE(std::isfinite(x));
    ASSERT_NO_FATAL_FAILURE(check(problem));
  }
}

// The bits of a row must not depend on whether its block took the path for values that are not finite.
TEST(CpuForward, UnseenPoisonChangesNoBit) {
  Shape const shape{.head_dim = 24, .heads = 1, .kv_heads = 1, .seqlen_q = 100, .seqlen_k = 100,
                    .mask = MaskKind::causal};
  Problem clean{shape, {}, 7}, poisoned{shape, {}, 7};
  poisoned.k.fill_row(50, nan);
  poisoned.v.fill_row(50, inf);
  for (Isa const isa : available_isas()) {
    Result const a = run(isa, clean), b = run(isa, poisoned);
    for (int i = 0; i < 50; ++i) {
      for (int e = 0; e < 24; ++e) ASSERT_EQ(a.out.at(0, i, 0, e), b.out.at(0, i, 0, e)) << "row " << i;
      ASSERT_EQ(a.lse.at(0, i, 0, 0), b.lse.at(0, i, 0, 0));
    }
    ASSERT_TRUE(std::isnan(b.out.at(0, 50, 0, 0)));
  }
}

// NaN in a query that a max() or a clamp swallows (pytorch 141128), or that spreads to other queries.
TEST(CpuForward, QueryPoisonStaysInItsRow) {
  for (DType const dtype : all_dtypes) {
    for (MaskKind const mask : all_masks) {
      for (double const poison : {nan, inf, -inf}) {
        Problem problem{Shape{.dtype = dtype, .head_dim = 8, .seqlen_q = 100, .seqlen_k = 150, .mask = mask}};
        problem.q.put(0, 66, 1, 3, poison);
        ASSERT_NO_FATAL_FAILURE(check(problem));
      }
    }
  }
}

// Scores of -inf: all of a row's (NaN, LSE -inf: not taken for a row that sees nothing), all of a block's,
// first or last visited, and some (exp(-inf - -inf), pytorch 127055). One +inf makes the row NaN.
TEST(CpuForward, InfiniteScores) {
  struct Keys {
    int begin, end;
    double value;
  };
  Keys const cases[] = {{0, 150, -inf},  {0, 64, -inf},  {128, 150, -inf},
                        {64, 150, -inf}, {10, 20, -inf}, {90, 91, inf}};
  for (DType const dtype : all_dtypes) {
    for (MaskKind const mask : all_masks) {
      for (Keys const& keys : cases) {
        Problem problem{Shape{.dtype = dtype, .head_dim = 1, .seqlen_q = 70, .seqlen_k = 150, .mask = mask}
                            .bottom_right()};
        problem.q.fill([] { return 1.0; });
        for (int j = keys.begin; j < keys.end; ++j) problem.k.fill_row(j, keys.value);
        ASSERT_NO_FATAL_FAILURE(check(problem));
      }
    }
  }
}

// ---- numbers -----------------------------------------------------------------------------------------

// exp of large positive or negative scores: overflow, a running maximum that is not subtracted, rows
// whose probabilities vanish (pytorch 196678). The tolerance follows the rounding of the scores.
TEST(CpuForward, LargeAndSmallScores) {
  for (DType const dtype : {DType::float32, DType::float64, DType::bfloat16}) {
    for (double const size : {1e-30, 1e-3, 30.0, 1000.0}) {
      Problem problem{Shape{.dtype = dtype, .head_dim = 4, .seqlen_q = 90, .seqlen_k = 140, .scale = size}};
      ASSERT_NO_FATAL_FAILURE(check(problem, {}, std::max(1.0, size / 3)));
    }
    for (double const shift : {-300.0, 300.0}) {  // all scores of all rows lie near `shift`
      Problem problem{Shape{.dtype = dtype, .head_dim = 4, .seqlen_q = 90, .seqlen_k = 140, .scale = 1}};
      for (int i = 0; i < 90; ++i) problem.q.fill_row(i, 1);
      for (int j = 0; j < 140; ++j) problem.k.fill_row(j, (shift + j % 3) / 4);
      ASSERT_NO_FATAL_FAILURE(check(problem, {}, 20));
    }
  }
}

// The maximum grows with every block visited, or only the last block counts: O not rescaled.
TEST(CpuForward, MaximumMovesFromBlockToBlock) {
  for (double const slope : {-0.25, 0.25}) {
    Problem problem{Shape{.head_dim = 2, .seqlen_q = 20, .seqlen_k = 400, .scale = 1}};
    problem.q.fill([] { return 1.0; });
    for (int j = 0; j < 400; ++j) problem.k.fill_row(j, slope * j);
    ASSERT_NO_FATAL_FAILURE(check(problem, {}, 10));
  }
}

// scale 0 means the average of the visible values, not of all, and not 0 * -inf = NaN.
TEST(CpuForward, ScaleZero) {
  for (DType const dtype : all_dtypes) {
    for (MaskKind const mask : all_masks) {
      Problem problem{Shape{.dtype = dtype, .head_dim = 8, .seqlen_q = 100, .seqlen_k = 80, .mask = mask, .scale = 0}
                          .bottom_right()};
      ASSERT_NO_FATAL_FAILURE(check(problem));
    }
  }
}

// Wrong conversions of 16-bit values: with a single key the output is the value, for every bit pattern.
TEST(CpuForward, EverySixteenBitValueSurvives) {
  for (DType const dtype : {DType::float16, DType::bfloat16}) {
    Problem problem{Shape{.dtype = dtype, .head_dim = 256, .batch = 256, .heads = 1, .kv_heads = 1, .seqlen_q = 1,
                          .seqlen_k = 1}};
    auto* const bits = static_cast<uint16_t*>(problem.v.data());
    for (int i = 0; i < 65536; ++i) bits[i] = static_cast<uint16_t>(i);
    for (Isa const isa : available_isas()) {
      Result r = run(isa, problem);
      for (int i = 0; i < 65536; ++i) {
        double const got = r.out.at(i / 256, 0, 0, i % 256), want = get(dtype, bits + i);
        ASSERT_TRUE(std::isnan(want) ? std::isnan(got) : got == want)
            << name_of(isa) << " " << name_of(dtype) << " bits " << i << ": " << got << ", expected " << want;
      }
    }
  }
}

// Rounding to 16 bits that cuts, or rounds ties away from even: the mean of two neighbours is a tie.
TEST(CpuForward, SixteenBitOutputsRoundToNearestEven) {
  for (DType const dtype : {DType::float16, DType::bfloat16}) {
    int const largest = dtype == DType::float16 ? 0x7bff : 0x7eff;  // bf16: the sum of two must not overflow fp32
    Problem problem{Shape{.dtype = dtype, .head_dim = 256, .batch = 128, .heads = 1, .kv_heads = 1, .seqlen_q = 1,
                          .seqlen_k = 2, .scale = 0}};
    auto* const bits = static_cast<uint16_t*>(problem.v.data());
    auto const low = [&](int i) { return std::min(i, largest - 1); };
    for (int i = 0; i < 128 * 256; ++i) {
      uint16_t* const pair = bits + (i / 256) * 512 + i % 256;
      pair[0] = static_cast<uint16_t>(low(i));
      pair[256] = static_cast<uint16_t>(low(i) + 1);
    }
    for (Isa const isa : available_isas()) {
      Result r = run(isa, problem);
      auto const* const out = static_cast<uint16_t*>(r.out.data());
      for (int i = 0; i < 128 * 256; ++i) {
        ASSERT_EQ(out[i], low(i) + low(i) % 2) << name_of(isa) << " " << name_of(dtype) << " " << i;
      }
    }
  }
}

// ---- threads -----------------------------------------------------------------------------------------

Shape large(DType dtype = DType::float32) {
  return {.dtype = dtype, .head_dim = 32, .batch = 2, .heads = 3, .kv_heads = 3, .seqlen_q = 300, .seqlen_k = 300,
          .mask = MaskKind::causal};
}

// Results that depend on the number of threads or on timing.
TEST(CpuForward, SameBitsWithAnyNumberOfThreads) {
  for (DType const dtype : all_dtypes) {
    Problem problem{large(dtype)};
    for (Isa const isa : available_isas()) {
      Result const alone = run(isa, problem, 1);
      for (int const threads : {2, 3, 8}) {
        for (int repeat = 0; repeat < 5; ++repeat) ASSERT_TRUE(same_bits(run(isa, problem, threads), alone));
      }
    }
  }
}

// A sequence whose result changes with its batch mates (flash-attention 1897).
TEST(CpuForward, SameBitsAloneAndInABatch) {
  for (DType const dtype : all_dtypes) {
    Shape shape = large(dtype);
    Problem batch{shape};
    shape.batch = 1;
    Problem single{shape};
    Tensor* const to[] = {&single.q, &single.k, &single.v};
    Tensor* const from[] = {&batch.q, &batch.k, &batch.v};
    size_t const bytes = static_cast<size_t>(batch.q.stride().batch * size_of(dtype));
    for (int t = 0; t < 3; ++t) std::memcpy(to[t]->data(), static_cast<char*>(from[t]->data()) + bytes, bytes);
    for (Isa const isa : available_isas()) {
      Result together = run(isa, batch), alone = run(isa, single);
      EXPECT_EQ(0, std::memcmp(alone.out.data(), static_cast<char*>(together.out.data()) + bytes, bytes));
    }
  }
}

// A result that depends on which other rows share the tile: one query alone against the same query among
// others.
TEST(CpuForward, SameBitsForARowAlone) {
  for (DType const dtype : all_dtypes) {
    Shape shape{.dtype = dtype, .head_dim = 40, .heads = 1, .kv_heads = 1, .seqlen_q = 100, .seqlen_k = 150};
    Problem many{shape};
    shape.seqlen_q = 1;
    for (Isa const isa : available_isas()) {
      Result const all = run(isa, many);
      for (int const row : {0, 15, 63, 64, 99}) {
        Problem one{shape};
        one.k = many.k;
        one.v = many.v;
        for (int e = 0; e < 40; ++e) one.q.put(0, 0, 0, e, many.q.at(0, row, 0, e));
        Result const alone = run(isa, one);
        for (int e = 0; e < 40; ++e) ASSERT_EQ(alone.out.at(0, 0, 0, e), all.out.at(0, row, 0, e));
        ASSERT_EQ(alone.lse.at(0, 0, 0, 0), all.lse.at(0, row, 0, 0));
      }
    }
  }
}

// Callers on several threads at once: shared scratch, a pool that serves two jobs as one, a deadlock.
TEST(CpuForward, EightCallersAtOnce) {
  std::vector<Problem> problems;
  std::vector<Result> want;
  Isa const best = cpu::choose_isa("auto");
  for (int i = 0; i < 8; ++i) {
    Shape shape = large(all_dtypes[i % 4]);
    shape.head_dim = 8 + 5 * i;
    problems.emplace_back(shape);
    want.push_back(run(best, problems.back(), 1));
  }
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (size_t i = 0; i < 8; ++i) {
    callers.emplace_back([&, i] {
      for (int repeat = 0; repeat < 20; ++repeat) wrong += !same_bits(run(best, problems[i], 4), want[i]);
    });
  }
  for (std::thread& t : callers) t.join();
  EXPECT_EQ(wrong, 0);
}

/// Exit code of `work` in a forked child, or -1 if it hangs or crashes.
int in_child(std::function<int()> const& work) {
  pid_t const child = fork();
  if (child == 0) {
    alarm(60);  // a child that hangs dies by this
    _exit(work());
  }
  int status = -1;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

// A child of fork that waits for threads which exist only in its parent (as libgomp does): forks before and
// after the parent used its threads, while it uses them, and a grandchild.
TEST(CpuForward, WorksInForkedChildren) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "ThreadSanitizer does not allow threads after a fork";
#endif
  Isa const best = cpu::choose_isa("auto");
  Problem problem{large()};
  Result const want = run(best, problem, 1);
  auto const works = [&] { return same_bits(run(best, problem, 4), want) ? 0 : 1; };

  EXPECT_EQ(in_child([&] { return in_child(works) + works(); }), 0);
  EXPECT_EQ(works(), 0);
  EXPECT_EQ(in_child([&] { return works() + in_child(works) + works(); }), 0);

  std::atomic<bool> stop{false};
  std::thread busy{[&] {
    while (!stop) works();
  }};
  for (int i = 0; i < 20; ++i) EXPECT_EQ(in_child(works), 0);
  stop = true;
  busy.join();
  EXPECT_EQ(works(), 0);
}

// A process that exits while its worker threads sleep: a hang or a crash in static destructors.
TEST(CpuForward, ExitsCleanlyAfterUse) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");  // in a new process, not in a fork of this one
  Problem problem{large()};
  EXPECT_EXIT(
      {
        alarm(60);
        run(cpu::choose_isa("auto"), problem, 4);
        std::exit(0);
      },
      testing::ExitedWithCode(0), "");
}

// ---- the thread pool ---------------------------------------------------------------------------------

// Indices done twice or not at all; a return before all are done.
TEST(ThreadPool, CallsEachIndexOnce) {
  for (int const count : {0, 1, 2, 3, 1000}) {
    for (int const threads : {1, 2, 8}) {
      std::vector<std::atomic<int>> calls(static_cast<size_t>(count));
      cpu::parallel_for(count, threads, [&](int64_t i) { ++calls[static_cast<size_t>(i)]; });
      for (std::atomic<int> const& c : calls) ASSERT_EQ(c, 1);
    }
  }
}

// A pool that works on the caller's thread only, or on more threads than it may: every task waits until as
// many are running as there are threads.
TEST(ThreadPool, UsesTheThreadsItMay) {
  for (int const threads : {1, 2, 4}) {
    std::atomic<int> running{0}, most{0};
    std::mutex mutex;
    std::set<std::thread::id> ids;
    cpu::parallel_for(64, threads, [&](int64_t) {
      int const now = ++running;
      for (int seen = most; seen < now && !most.compare_exchange_weak(seen, now);) continue;
      auto const deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
      while (most < threads && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
      {
        std::lock_guard const lock{mutex};
        ids.insert(std::this_thread::get_id());
      }
      --running;
    });
    EXPECT_EQ(most, threads);
    EXPECT_EQ(ids.size(), static_cast<size_t>(threads));
    EXPECT_TRUE(ids.count(std::this_thread::get_id()));
  }
}

// An exception on a worker that ends the process, gets lost, comes after all the remaining work, or leaves
// the pool unusable.
TEST(ThreadPool, PassesExceptionsOn) {
  int started = 0;
  EXPECT_THROW(cpu::parallel_for(100, 1, [&](int64_t) { ++started, throw std::runtime_error("first"); }),
               std::runtime_error);
  EXPECT_EQ(started, 1);
  for (int const threads : {1, 4}) {
    for (int repeat = 0; repeat < 20; ++repeat) {
      auto const failing = [](int64_t i) {
        if (i == 7) throw std::runtime_error("seven");
      };
      EXPECT_THROW(cpu::parallel_for(100, threads, failing), std::runtime_error);
      std::atomic<int> calls{0};
      cpu::parallel_for(100, threads, [&](int64_t) { ++calls; });
      EXPECT_EQ(calls, 100);
    }
  }
}

// A call from inside a task that waits for threads which are all busy.
TEST(ThreadPool, NestedCallsFinish) {
  std::atomic<int> calls{0};
  cpu::parallel_for(16, 4, [&](int64_t) { cpu::parallel_for(16, 4, [&](int64_t) { ++calls; }); });
  EXPECT_EQ(calls, 256);
}

// Workers that spin between calls.
TEST(ThreadPool, SleepsWhenIdle) {
  auto const cpu_time = [] {
    timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
  };
  cpu::parallel_for(64, 4, [](int64_t) {});
  double const before = cpu_time();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  EXPECT_LT(cpu_time() - before, 0.05);
}

// ---- choices -----------------------------------------------------------------------------------------

// A misspelt or unavailable instruction set that is ignored.
TEST(CpuDispatch, OnlyAvailableInstructionSetsAreChosen) {
  for (Isa const isa : available_isas()) EXPECT_EQ(cpu::choose_isa(name_of(isa)), isa);
  EXPECT_EQ(cpu::choose_isa("auto"), available_isas().back());
  for (Isa const isa : cpu::all_isas) {
    if (!cpu::is_available(isa)) EXPECT_THROW(cpu::choose_isa(name_of(isa)), ArgumentError);
  }
  try {
    cpu::choose_isa("avx9");
    FAIL() << "no exception";
  } catch (ArgumentError const& e) {
    for (char const* part : {"FLASHCUTE_CPU_ISA", name_of(available_isas().back()), "avx9"}) {
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
    }
  }
}

// An affinity mask (taskset, a container) that is ignored: too many threads for the CPUs there are.
TEST(CpuDispatch, ThreadsFollowAffinity) {
  EXPECT_EQ(in_child([] {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    if (sched_setaffinity(0, sizeof(one), &one) != 0) return 2;
    return cpu::available_cpus() == 1 ? 0 : 1;
  }), 0);
}

// The public entry: the same result as the chosen instruction set gives.
TEST(CpuDispatch, ForwardUsesTheChosenIsa) {
  Problem problem{large()};
  Isa const chosen = cpu::choose_isa(cpu_isa());
  EXPECT_STREQ(cpu::isa(), name_of(chosen));
  EXPECT_EQ(cpu::num_threads(), cpu_threads().value_or(cpu::available_cpus()));
  Result const want = run(chosen, problem, 1);
  Shape const& s = problem.shape;
  Tensor out{s.dtype, s.batch, s.seqlen_q, s.heads, s.head_dim, {}, untouched};
  ForwardParams p = params_of(problem);
  p.out = out.data();
  p.out_stride = out.stride();
  cpu::forward(config_of(s), {s.mask}, p);
  EXPECT_EQ(out.bytes(), want.out.bytes());
}

}  // namespace
