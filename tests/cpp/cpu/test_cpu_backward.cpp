// What the CPU backend's backward computes, against naive gradients in long double. Every test names the failure
// that it guards against.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <numbers>
#include <random>
#include <utility>

#include "cpu/cpu_problem.hpp"

namespace flashcute::testing {
namespace {

// ---- a problem with gradients ------------------------------------------------------------------------

/// What the backward reads, exact in its types: the forward's problem and results, and gradients of these.
struct BackwardProblem : Problem {
  Tensor out, lse, dout, dlse;
  Reference forward;
  bool with_dlse;
  double loosen;  // the tolerance

  explicit BackwardProblem(Shape const& s, Placement const& at = {}, bool with_dlse = false, double loosen = 1,
                           unsigned seed = std::random_device{}())
      : Problem{s, at, seed},
        out{s.dtype, s.batch, s.seqlen_q, s.heads, s.head_dim_v, at},
        lse{lse_type(s.dtype), s.batch, s.seqlen_q, s.heads, 1, {.order = Order::bhsd}},
        dout{s.dtype, s.batch, s.seqlen_q, s.heads, s.head_dim_v, at},
        dlse{lse_type(s.dtype), s.batch, s.seqlen_q, s.heads, 1, {.row_gap = 3}},
        with_dlse{with_dlse},
        loosen{loosen} {
    std::mt19937 random{seed + 1};
    std::normal_distribution<double> normal;
    for (Tensor* const t : {&dout, &dlse}) t->fill([&] { return normal(random); });
    run_forward();
  }

  /// out and lse of the inputs as they are now, from the reference.
  void run_forward() {
    forward = reference(*this);
    for (int b = 0; b < shape.batch; ++b) {
      for (int i = 0; i < shape.seqlen_q; ++i) {
        for (int h = 0; h < shape.heads; ++h) {
          size_t const row = forward.row(b, i, h);
          lse.put(b, i, h, 0, static_cast<double>(forward.lse[row]));
          for (int e = 0; e < shape.head_dim_v; ++e) {
            out.put(b, i, h, e, static_cast<double>(forward.out[row * shape.head_dim_v + e]));
          }
        }
      }
    }
  }
};

struct Gradients {
  Tensor dq, dk, dv;
};

inline BackwardConfig backward_config_of(Shape const& s) {
  return {
      .dtype = s.dtype, .head_dim = s.head_dim, .head_dim_v = s.head_dim_v, .block_m = s.block_m, .block_n = s.block_n};
}

BackwardParams backward_params_of(BackwardProblem& problem) {
  BackwardParams p{};
  p.forward = params_of(problem);
  p.forward.out = problem.out.data();
  p.forward.out_stride = problem.out.stride();
  p.forward.lse = problem.lse.data();
  p.dout = problem.dout.data();
  p.dout_stride = problem.dout.stride();
  if (problem.with_dlse) p.dlse = problem.dlse.data();
  p.dlse_stride = problem.dlse.stride();
  return p;
}

Gradients run(Isa isa, BackwardProblem& problem, int threads = 2, Placement const& at = {}) {
  Shape const& s = problem.shape;
  Gradients g{{s.dtype, s.batch, s.seqlen_q, s.heads, s.head_dim, at, untouched},
              {s.dtype, s.batch, s.seqlen_k, s.kv_heads, s.head_dim, at, untouched},
              {s.dtype, s.batch, s.seqlen_k, s.kv_heads, s.head_dim_v, at, untouched}};
  BackwardParams p = backward_params_of(problem);
  p.dq = g.dq.data();
  p.dk = g.dk.data();
  p.dv = g.dv.data();
  p.dq_stride = g.dq.stride();
  p.dk_stride = g.dk.stride();
  p.dv_stride = g.dv.stride();
  cpu::backward_with(isa, threads, backward_config_of(s), {s.mask}, p);
  return g;
}

// ---- the reference -----------------------------------------------------------------------------------

/// Sums, (batch, rows, heads, d), in long double, and how large their terms were: dS = P (dP - delta) may cancel, and
/// no algorithm knows it better than to a rounding of what was subtracted.
struct Array {
  int rows, heads, d;
  std::vector<long double> values, sizes;

  Array(int batch, int rows, int heads, int d)
      : rows{rows}, heads{heads}, d{d}, values(static_cast<size_t>(batch) * rows * heads * d), sizes(values.size()) {}

  size_t index(int b, int i, int h, int e) const { return ((static_cast<size_t>(b) * rows + i) * heads + h) * d + e; }

  void add(int b, int i, int h, int e, long double x, long double size) {
    values[index(b, i, h, e)] += x;
    sizes[index(b, i, h, e)] += std::fabs(size);
  }

  long double largest() const {
    long double result = 1e-30;
    for (long double const x : sizes) {
      if (std::isfinite(x)) result = std::max(result, x);
    }
    return result;
  }
};

struct ReferenceGradients {
  Array dq, dk, dv;
};

/// Element by element, from the definition; what is not visible is not looked at.
ReferenceGradients reference_gradients(BackwardProblem const& problem) {
  Shape const& s = problem.shape;
  ReferenceGradients r{{s.batch, s.seqlen_q, s.heads, s.head_dim},
                       {s.batch, s.seqlen_k, s.kv_heads, s.head_dim},
                       {s.batch, s.seqlen_k, s.kv_heads, s.head_dim_v}};
  std::vector<long double> q(s.head_dim), dout(s.head_dim_v);
  for (int b = 0; b < s.batch; ++b) {
    for (int h = 0; h < s.heads; ++h) {
      int const kv = h * s.kv_heads / s.heads;
      std::vector<double> const k = rows_of(problem.k, b, kv, s.seqlen_k, s.head_dim),
                                v = rows_of(problem.v, b, kv, s.seqlen_k, s.head_dim_v);
      for (int i = 0; i < s.seqlen_q; ++i) {
        for (int e = 0; e < s.head_dim; ++e) q[e] = problem.q.at(b, i, h, e);
        long double delta = problem.with_dlse ? -problem.dlse.at(b, i, h, 0) : 0;
        long double delta_size = std::fabs(delta);
        for (int e = 0; e < s.head_dim_v; ++e) {
          dout[e] = problem.dout.at(b, i, h, e);
          delta += dout[e] * problem.out.at(b, i, h, e);
          delta_size += std::fabs(dout[e] * problem.out.at(b, i, h, e));
        }
        long double const lse = problem.forward.lse[problem.forward.row(b, i, h)];
        for (int const j : keys_of(s, b, h, i)) {
          double const* const key = k.data() + static_cast<size_t>(j) * s.head_dim;
          double const* const value = v.data() + static_cast<size_t>(j) * s.head_dim_v;
          long double score = 0, dp = 0, dp_size = 0;
          for (int e = 0; e < s.head_dim; ++e) score += q[e] * key[e];
          for (int e = 0; e < s.head_dim_v; ++e) {
            dp += dout[e] * value[e];
            dp_size += std::fabs(dout[e] * value[e]);
          }
          long double const p = std::exp(s.scale * score - lse);
          long double const ds = p * (dp - delta);
          long double const size = p * (dp_size + delta_size) * s.scale;
          for (int e = 0; e < s.head_dim; ++e) {
            r.dq.add(b, i, h, e, s.scale * ds * key[e], size * key[e]);
            r.dk.add(b, j, kv, e, s.scale * ds * q[e], size * q[e]);
          }
          for (int e = 0; e < s.head_dim_v; ++e) r.dv.add(b, j, kv, e, p * dout[e], p * dout[e]);
        }
      }
    }
  }
  return r;
}

void expect_matches(char const* name, Tensor const& got, Array const& want, int batch, DType dtype, double loosen) {
  double const arithmetic = loosen * (dtype == DType::float64 ? 2e-14 : 1e-5);
  long double const largest = want.largest();
  for (int b = 0; b < batch; ++b) {
    for (int i = 0; i < want.rows; ++i) {
      for (int h = 0; h < want.heads; ++h) {
        for (int e = 0; e < want.d; ++e) {
          long double const x = want.values[want.index(b, i, h, e)];
          double const smallest = dtype == DType::float16 ? 0x1p-25 : 0;
          double const tolerance =
              static_cast<double>(arithmetic * largest + rounding(dtype) * 1.01 * std::fabs(x)) + smallest;
          ASSERT_TRUE(close(got.at(b, i, h, e), x, tolerance))
              << name << "[" << b << ", " << i << ", " << h << ", " << e << "] = " << got.at(b, i, h, e)
              << ", expected " << x << " within " << tolerance;
        }
      }
    }
  }
  ASSERT_TRUE(got.gaps_untouched()) << "wrote to memory between or behind the rows of " << name;
}

void check(BackwardProblem& problem, Placement const& to = {}) {
  Shape const& s = problem.shape;
  ReferenceGradients const want = reference_gradients(problem);
  for (Isa const isa : available_isas()) {
    SCOPED_TRACE(describe(s) + " on " + name_of(isa));
    Gradients const g = run(isa, problem, 2, to);
    ASSERT_NO_FATAL_FAILURE(expect_matches("dq", g.dq, want.dq, s.batch, s.dtype, problem.loosen));
    ASSERT_NO_FATAL_FAILURE(expect_matches("dk", g.dk, want.dk, s.batch, s.dtype, problem.loosen));
    ASSERT_NO_FATAL_FAILURE(expect_matches("dv", g.dv, want.dv, s.batch, s.dtype, problem.loosen));
  }
}

bool same_bits(Gradients const& a, Gradients const& b) {
  return a.dq.bytes() == b.dq.bytes() && a.dk.bytes() == b.dk.bytes() && a.dv.bytes() == b.dv.bytes();
}

// ---- shapes ------------------------------------------------------------------------------------------

// Zero and one rows or keys, lengths around the tile, queries that see nothing, keys that nobody sees: crashes,
// gradients that are not written, NaN in place of zero.
TEST(CpuBackward, EveryPairOfLengths) {
  int const lengths[] = {0, 1, 2, 17, 64, 65, 127};
  for (DType const dtype : all_dtypes) {
    for (MaskKind const mask : all_masks) {
      for (int const seqlen_q : lengths) {
        for (int const seqlen_k : lengths) {
          BackwardProblem problem{
              Shape{.dtype = dtype, .head_dim = 24, .seqlen_q = seqlen_q, .seqlen_k = seqlen_k, .mask = mask}
                  .bottom_right()};
          ASSERT_NO_FATAL_FAILURE(check(problem));
        }
      }
    }
  }
}

// Head dims that are multiples of 8 but not of 16 gave wrong dQ elsewhere, others read past the row.
TEST(CpuBackward, EveryKindOfHeadDim) {
  for (DType const dtype : all_dtypes) {
    for (int const d : {1, 2, 3, 5, 7, 8, 13, 40, 64, 72, 104, 128, 200, 255, 256}) {
      BackwardProblem problem{Shape{.dtype = dtype,
                                    .head_dim = d,
                                    .seqlen_q = 67,
                                    .seqlen_k = 81,
                                    .mask = MaskKind::causal,
                                    .scale = 1 / std::sqrt(d)}
                                  .bottom_right()};
      ASSERT_NO_FATAL_FAILURE(check(problem));
    }
  }
}

// Guards against v, dO and dV taken for as wide as q and k, and scratch of the wrong width.
TEST(CpuBackward, HeadDimsOfValues) {
  for (DType const dtype : all_dtypes) {
    for (MaskKind const mask : all_masks) {
      for (auto const& [d, d_v] : {std::pair(8, 13), {1, 256}, {256, 1}, {72, 64}}) {
        BackwardProblem problem{
            Shape{.dtype = dtype, .head_dim = d, .head_dim_v = d_v, .seqlen_q = 67, .seqlen_k = 91, .mask = mask}
                .bottom_right()};
        ASSERT_NO_FATAL_FAILURE(check(problem));
      }
    }
  }
}

// Tiles of any size and a compiled head dim wider than the tensors': scratch too small, or of the wrong stride.
TEST(CpuBackward, EveryTile) {
  for (DType const dtype : {DType::float32, DType::float64, DType::bfloat16}) {
    for (int const block_m : {16, 48, 112, 256}) {
      for (int const block_n : {16, 80, 256}) {
        BackwardProblem problem{Shape{.dtype = dtype,
                                      .head_dim = 24,
                                      .seqlen_q = 133,
                                      .seqlen_k = 133,
                                      .mask = MaskKind::causal,
                                      .block_m = block_m,
                                      .block_n = block_n}};
        ASSERT_NO_FATAL_FAILURE(check(problem));
      }
    }
  }
}

// Sums over the wrong query heads, or over one of the group only; batches that read each other's.
TEST(CpuBackward, GroupedHeads) {
  for (int const kv_heads : {1, 2, 3, 6}) {
    BackwardProblem problem{
        Shape{.head_dim = 16, .batch = 3, .heads = 6, .kv_heads = kv_heads, .seqlen_q = 33, .seqlen_k = 50}};
    ASSERT_NO_FATAL_FAILURE(check(problem));
  }
}

// The causal diagonal in the wrong place in either pass: offsets that hide all keys from some or all rows.
// Queries and keys that see nothing have gradient zero.
TEST(CpuBackward, CausalOffsets) {
  for (int const offset : {-1000, -65, -64, -63, -1, 0, 1, 13, 63, 64, 1000}) {
    BackwardProblem problem{
        Shape{.head_dim = 8, .seqlen_q = 130, .seqlen_k = 90, .mask = MaskKind::causal, .causal_offset = offset}};
    ASSERT_NO_FATAL_FAILURE(check(problem));
  }
}

// Windows that end at one or the other side of a tile's and a block's edges; queries that see no key, at either end.
TEST(CpuBackward, Windows) {
  for (DType const dtype : all_dtypes) {
    for (int const first : {-140, -64, -10, 0, 70}) {
      for (int const size : {0, 1, 63, 64, 100, 220}) {
        BackwardProblem problem{Shape{.dtype = dtype,
                                      .head_dim = 8,
                                      .seqlen_q = 130,
                                      .seqlen_k = 170,
                                      .mask = MaskKind::band,
                                      .causal_offset = first + size,
                                      .window_offset = first}};
        ASSERT_NO_FATAL_FAILURE(check(problem));
      }
    }
  }
}

// Masks by element: the bits of other rows or columns, in tiles that begin or end within a cell, on vectors of every
// width, in either pass; a head that sees another's map; NaN in a key that only some queries see, or in a query.
TEST(CpuBackward, Maps) {
  for_each_mapped_shape({60}, [](Shape const& shape) {
    BackwardProblem problem{shape};
    put_special_values(problem);
    problem.run_forward();
    ASSERT_NO_FATAL_FAILURE(check(problem));
  });
}

// The gradient of the LSE left out, of the wrong sign, or read with the wrong strides.
TEST(CpuBackward, GradientOfLse) {
  for (DType const dtype : all_dtypes) {
    for (MaskKind const mask : all_masks) {
      BackwardProblem problem{
          Shape{.dtype = dtype, .head_dim = 16, .batch = 2, .seqlen_q = 90, .seqlen_k = 70, .mask = mask}
              .bottom_right(),
          {},
          true};
      ASSERT_NO_FATAL_FAILURE(check(problem));
    }
  }
}

// ---- memory ------------------------------------------------------------------------------------------

// Strides other than those of a packed tensor, bases aligned to one element only; what lies between the rows is
// NaN, so reading it shows.
TEST(CpuBackward, StridesAndAlignment) {
  for (DType const dtype : all_dtypes) {
    for (Order const order : {Order::bshd, Order::bhsd}) {
      for (int const gap : {0, 1, 9}) {
        Placement const at{.order = order, .row_gap = gap, .offset = 1};
        BackwardProblem problem{Shape{.dtype = dtype, .head_dim = 33, .batch = 2, .seqlen_q = 70, .seqlen_k = 77}, at};
        ASSERT_NO_FATAL_FAILURE(check(problem, at));
      }
    }
  }
}

// Expanded gradients of the output, which have stride 0, and expanded inputs.
TEST(CpuBackward, StrideZero) {
  BackwardProblem problem{Shape{.head_dim = 16, .batch = 3, .heads = 4, .kv_heads = 4, .seqlen_q = 20, .seqlen_k = 30}};
  problem.q.set_stride({0, problem.q.stride().row, problem.q.stride().head});
  problem.k.set_stride({problem.k.stride().batch, problem.k.stride().row, 0});
  problem.v.set_stride({problem.v.stride().batch, 0, problem.v.stride().head});
  problem.dout.set_stride({0, 0, 0});
  problem.run_forward();
  check(problem);
}

// Reading or writing beyond the last element: every tensor ends where the accessible memory does.
TEST(CpuBackward, StaysInsideItsMemory) {
  size_t const page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  for (DType const dtype : all_dtypes) {
    for (int const d : {1, 3, 40}) {
      BackwardProblem problem{
          Shape{.dtype = dtype, .head_dim = d, .heads = 1, .kv_heads = 1, .seqlen_q = 19, .seqlen_k = 21}, {}, true};
      Gradients const want = run(Isa::baseline, problem);
      BackwardParams p = backward_params_of(problem);
      std::vector<void*> mapped;
      auto const at_the_end = [&](void const* from, int rows, int width, DType type) -> void* {
        size_t const bytes = static_cast<size_t>(rows * width * size_of(type));
        void* const memory = mmap(nullptr, 4 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        EXPECT_NE(memory, MAP_FAILED);
        EXPECT_LE(bytes, 2 * page);
        mapped.push_back(memory);
        mprotect(memory, page, PROT_NONE);
        mprotect(static_cast<char*>(memory) + 3 * page, page, PROT_NONE);
        char* const to = static_cast<char*>(memory) + 3 * page - bytes;
        if (from != nullptr) std::memcpy(to, from, bytes);
        return to;
      };
      ForwardParams& f = p.forward;
      f.q = at_the_end(f.q, 19, d, dtype);
      f.k = at_the_end(f.k, 21, d, dtype);
      f.v = at_the_end(f.v, 21, d, dtype);
      f.out = at_the_end(f.out, 19, d, dtype);
      f.lse = at_the_end(f.lse, 19, 1, lse_type(dtype));
      p.dout = at_the_end(p.dout, 19, d, dtype);
      p.dlse = at_the_end(problem.lse.data(), 19, 1, lse_type(dtype));
      p.dlse_stride = {0, 1, 0};
      p.dq = at_the_end(nullptr, 19, d, dtype);
      p.dk = at_the_end(nullptr, 21, d, dtype);
      p.dv = at_the_end(nullptr, 21, d, dtype);
      p.dq_stride = p.dk_stride = p.dv_stride = {0, d, 0};
      for (Isa const isa : available_isas()) {
        cpu::backward_with(isa, 1, backward_config_of(problem.shape), {}, p);
        ASSERT_NEAR(get(dtype, static_cast<char*>(p.dv) + (21 * d - 1) * size_of(dtype)), want.dv.at(0, 20, 0, d - 1),
                    0.05);
      }
      for (void* const memory : mapped) munmap(memory, 4 * page);
    }
  }
}

// Offsets beyond 2^31 elements, computed in 32 bits: K, V and their gradients far apart in memory that takes
// no room until it is touched.
TEST(CpuBackward, OffsetsBeyond32Bits) {
  int64_t const far = (int64_t{1} << 31) + 24;
  int const d = 8;
  BackwardProblem problem{Shape{
      .dtype = DType::bfloat16, .head_dim = d, .batch = 2, .heads = 1, .kv_heads = 1, .seqlen_q = 3, .seqlen_k = 1}};
  Gradients const want = run(Isa::baseline, problem);
  size_t const bytes = static_cast<size_t>(2 * (far + 1000));
  char* memory[4];
  for (char*& m : memory) {
    void* const p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) GTEST_SKIP() << "cannot reserve " << bytes << " bytes of address space";
    m = static_cast<char*>(p);
  }
  BackwardParams p = backward_params_of(problem);
  Gradients g = run(Isa::baseline, problem);
  for (int b = 0; b < 2; ++b) {
    std::memcpy(memory[0] + 2 * b * far, static_cast<char*>(problem.k.data()) + 2 * b * d, 2 * d);
    std::memcpy(memory[1] + 2 * b * far, static_cast<char*>(problem.v.data()) + 2 * b * d, 2 * d);
  }
  p.forward.k = memory[0];
  p.forward.v = memory[1];
  p.forward.k_stride = p.forward.v_stride = p.dk_stride = p.dv_stride = {far, 0, 0};
  p.dq = g.dq.data();
  p.dq_stride = g.dq.stride();
  p.dk = memory[2];
  p.dv = memory[3];
  cpu::backward_with(Isa::baseline, 1, backward_config_of(problem.shape), {}, p);
  EXPECT_EQ(g.dq.bytes(), want.dq.bytes());
  for (int e = 0; e < d; ++e) {
    EXPECT_EQ(get(DType::bfloat16, memory[2] + 2 * (far + e)), want.dk.at(1, 0, 0, e));
    EXPECT_EQ(get(DType::bfloat16, memory[3] + 2 * (far + e)), want.dv.at(1, 0, 0, e));
  }
  for (char* const m : memory) munmap(m, bytes);
}

// ---- NaN and infinity --------------------------------------------------------------------------------

// NaN and inf in any input reach what sees them and nothing else, also within one block: 0 * NaN in dS K, dS^T Q
// or P^T dO, or NaN swallowed by a maximum.
TEST(CpuBackward, PoisonReachesWhatSeesIt) {
  for (DType const dtype : all_dtypes) {
    for (double const poison : {nan, inf}) {
      for (int const row : {0, 30, 63, 64, 99}) {
        for (int const which : {0, 1, 2, 3}) {
          BackwardProblem problem{
              Shape{.dtype = dtype, .head_dim = 24, .seqlen_q = 100, .seqlen_k = 100, .mask = MaskKind::causal}};
          Tensor* const inputs[] = {&problem.q, &problem.k, &problem.v, &problem.dout};
          inputs[which]->put(0, row, 1, 5, poison);
          problem.run_forward();
          SCOPED_TRACE("input " + std::to_string(which) + " row " + std::to_string(row));
          ASSERT_NO_FATAL_FAILURE(check(problem));
        }
      }
    }
  }
}

// Whatever nobody sees is NaN: keys and values beyond the diagonal, queries and gradients of rows without a key.
// All gradients are finite, and zero there.
TEST(CpuBackward, UnseenRowsAreNaN) {
  for (DType const dtype : all_dtypes) {
    BackwardProblem keys{
        Shape{.dtype = dtype, .head_dim = 24, .seqlen_q = 70, .seqlen_k = 203, .mask = MaskKind::causal}, {}, true};
    for (int row = 70; row < 203; ++row) keys.k.fill_row(row, nan), keys.v.fill_row(row, nan);
    keys.run_forward();
    for (long double const x : reference_gradients(keys).dk.values) ASSERT_TRUE(std::isfinite(x));
    ASSERT_NO_FATAL_FAILURE(check(keys));

    BackwardProblem rows{
        Shape{.dtype = dtype, .head_dim = 24, .seqlen_q = 150, .seqlen_k = 50, .mask = MaskKind::causal}.bottom_right(),
        {},
        true};
    for (int row = 0; row < 100; ++row) {
      rows.q.fill_row(row, nan), rows.dout.fill_row(row, nan), rows.dlse.fill_row(row, nan);
    }
    rows.run_forward();
    for (long double const x : reference_gradients(rows).dk.values) ASSERT_TRUE(std::isfinite(x));
    ASSERT_NO_FATAL_FAILURE(check(rows));
  }
}

// The same beside a window.
TEST(CpuBackward, KeysBesideAWindowAreNaN) {
  for (DType const dtype : all_dtypes) {
    BackwardProblem problem{Shape{.dtype = dtype,
                                  .head_dim = 24,
                                  .seqlen_q = 70,
                                  .seqlen_k = 203,
                                  .mask = MaskKind::band,
                                  .causal_offset = 90,
                                  .window_offset = 50},
                            {},
                            true};
    for (int row = 0; row < 203; ++row) {
      if (row < 50 || row >= 160) problem.k.fill_row(row, nan), problem.v.fill_row(row, nan);
    }
    problem.run_forward();
    for (long double const x : reference_gradients(problem).dk.values) ASSERT_TRUE(std::isfinite(x));
    ASSERT_NO_FATAL_FAILURE(check(problem));
  }
}

// Scores of -inf: their probability is 0 and so is their gradient; a row that has no other is NaN, as its output.
TEST(CpuBackward, InfiniteScores) {
  for (DType const dtype : all_dtypes) {
    for (auto const& [begin, end] : {std::pair(0, 150), {64, 150}, {10, 20}}) {
      BackwardProblem problem{Shape{.dtype = dtype, .head_dim = 2, .seqlen_q = 70, .seqlen_k = 150}};
      problem.q.fill([] { return 1.0; });
      for (int j = begin; j < end; ++j) problem.k.fill_row(j, -inf);
      problem.run_forward();
      ASSERT_NO_FATAL_FAILURE(check(problem));
    }
  }
}

// ---- numbers -----------------------------------------------------------------------------------------

// exp(S - LSE) with an LSE far below the range of exp, in tiles that are not full (pytorch 196678).
TEST(CpuBackward, VeryNegativeScores) {
  for (DType const dtype : all_dtypes) {
    for (int const length : {64, 100, 192, 320}) {
      for (double const shift : {-300.0, 300.0}) {
        BackwardProblem problem{Shape{.dtype = dtype,
                                      .head_dim = 4,
                                      .heads = 1,
                                      .kv_heads = 1,
                                      .seqlen_q = 70,
                                      .seqlen_k = length,
                                      .scale = 1},
                                {},
                                false,
                                20};
        for (int i = 0; i < 70; ++i) problem.q.fill_row(i, 1);
        for (int j = 0; j < length; ++j) problem.k.fill_row(j, (shift + j % 3) / 4);
        problem.run_forward();
        ASSERT_NO_FATAL_FAILURE(check(problem));
      }
    }
  }
}

// Scores so large that S - LSE is rounding error alone, and may be thousands: P stays between 0 and 1.
TEST(CpuBackward, HugeScores) {
  for (DType const dtype : {DType::float32, DType::bfloat16}) {
    for (double const scale : {1e6, 1e10, 1e20}) {
      BackwardProblem problem{Shape{.dtype = dtype, .head_dim = 8, .seqlen_q = 70, .seqlen_k = 90, .scale = scale}};
      problem.dout.fill([] { return 1.0; });
      for (Isa const isa : available_isas()) {
        Gradients const g = run(isa, problem);
        for (int j = 0; j < 90; ++j) {
          for (int e = 0; e < 8; ++e) {
            double const sum = g.dv.at(0, j, 0, e);  // of at most 70 probabilities
            ASSERT_TRUE(sum >= 0 && sum <= 70) << name_of(isa) << " scale " << scale << ": " << sum;
          }
        }
      }
    }
  }
}

// The scale multiplied into q or k overflows though no score does, and sums of dS K though no gradient does: NaN and
// infinity of inputs that are all finite.
TEST(CpuBackward, SizesThatOnlyTheResultMakesUpFor) {
  struct Sizes {
    DType dtype;
    double q, k, scale, dout;
  };
  std::vector<Sizes> const cases = {
      {DType::float32, 5e37, 2e-38, 10, 1e-4},   {DType::float32, 2e-38, 5e37, 10, 1e-4},
      {DType::float32, 1e-30, 1e37, 1e-7, 1e3},  {DType::float32, 1e37, 1e-30, 1e-7, 1e3},
      {DType::float32, 1e19, 1e19, 1e-38, 1},    {DType::bfloat16, 5e37, 2e-38, 10, 1e-4},
      {DType::float64, 5e306, 2e-308, 10, 1e-4}, {DType::float64, 2e-308, 5e306, 10, 1e-4}};
  for (Sizes const& c : cases) {
    BackwardProblem problem{
        Shape{.dtype = c.dtype, .head_dim = 4, .seqlen_q = 70, .seqlen_k = 140, .scale = c.scale}, {}, false, 4};
    std::mt19937 random{1};
    std::normal_distribution<double> normal;
    auto const fill = [&](Tensor& t, double size) {
      t.fill([&] { return size * std::clamp(normal(random), -2.0, 2.0); });
    };
    fill(problem.q, c.q);
    fill(problem.k, c.k);
    fill(problem.dout, c.dout);
    problem.run_forward();
    SCOPED_TRACE(std::to_string(std::log10(c.q)) + " " + std::to_string(std::log10(c.k)));
    ASSERT_NO_FATAL_FAILURE(check(problem));
  }
}

// Rounding errors that grow with the number of keys (dQ) or queries (dK, dV), because block after block is added to
// one sum. The terms of each sum have one sign, so that it is as large as they are; the LSE is near 0 and scale *
// log2(e) a power of two, because what is rounded there is in every probability alike.
TEST(CpuBackward, HundredsOfThousandsOfTerms) {
  for (auto const& [seqlen_q, seqlen_k] : {std::pair(3, 1 << 19), {1 << 19, 3}}) {
    Shape const shape{.head_dim = 1,
                      .heads = 1,
                      .kv_heads = 1,
                      .seqlen_q = seqlen_q,
                      .seqlen_k = seqlen_k,
                      .scale = std::numbers::ln2 * (seqlen_k > 3 ? 16 : 1)};
    BackwardProblem problem{shape, {}, true};
    std::mt19937 random{1};
    std::uniform_real_distribution<double> size{0.99, 1.01};
    problem.q.fill([&] { return size(random) * 19 / 16; });  // so many keys have 2^19 * 2^-19 in sum
    problem.k.fill([&] { return -size(random); });
    problem.v.fill([&] { return size(random) / 8; });
    problem.dout.fill([&] { return size(random); });
    problem.dlse.fill([&] { return 4.0; });
    problem.run_forward();
    ReferenceGradients const want = reference_gradients(problem);
    for (Isa const isa : available_isas()) {
      SCOPED_TRACE(describe(shape) + " on " + name_of(isa));
      Gradients const g = run(isa, problem);
      if (seqlen_k > 3) {
        ASSERT_NO_FATAL_FAILURE(expect_matches("dq", g.dq, want.dq, 1, shape.dtype, 0.05));
      } else {
        ASSERT_NO_FATAL_FAILURE(expect_matches("dk", g.dk, want.dk, 1, shape.dtype, 0.05));
        ASSERT_NO_FATAL_FAILURE(expect_matches("dv", g.dv, want.dv, 1, shape.dtype, 0.05));
      }
    }
  }
}

// Key heads that sum over many query heads of many blocks each: a block left out of the totals, or added twice.
TEST(CpuBackward, ManyBlocksOfManyHeads) {
  BackwardProblem problem{Shape{.head_dim = 8,
                                .heads = 10,
                                .kv_heads = 2,
                                .seqlen_q = 16 * 15,
                                .seqlen_k = 16 * 71,
                                .mask = MaskKind::causal,
                                .block_m = 16,
                                .block_n = 16}
                              .bottom_right()};
  ASSERT_NO_FATAL_FAILURE(check(problem));
}

// Scale 0: P is uniform over what is visible; dQ and dK are zero.
TEST(CpuBackward, ScaleZero) {
  for (DType const dtype : all_dtypes) {
    BackwardProblem problem{
        Shape{.dtype = dtype, .head_dim = 8, .seqlen_q = 100, .seqlen_k = 80, .mask = MaskKind::causal, .scale = 0}
            .bottom_right()};
    ASSERT_NO_FATAL_FAILURE(check(problem));
  }
}

// ---- the same bits -----------------------------------------------------------------------------------

// Sums whose order depends on the threads, or on the run.
TEST(CpuBackward, ThreadsChangeNoBit) {
  for (DType const dtype : all_dtypes) {
    BackwardProblem problem{Shape{.dtype = dtype,
                                  .head_dim = 40,
                                  .batch = 2,
                                  .heads = 4,
                                  .seqlen_q = 203,
                                  .seqlen_k = 203,
                                  .mask = MaskKind::causal}};
    for (Isa const isa : available_isas()) {
      Gradients const one = run(isa, problem, 1);
      for (int const threads : {2, 3, 8}) {
        for (int repeat = 0; repeat < 3; ++repeat) ASSERT_TRUE(same_bits(one, run(isa, problem, threads)));
      }
    }
  }
}

// A gradient that changes with the batch beside it, or with NaN where it sees nothing of it.
TEST(CpuBackward, NeighboursChangeNoBit) {
  Shape shape{.head_dim = 24, .heads = 1, .kv_heads = 1, .seqlen_q = 100, .seqlen_k = 100, .mask = MaskKind::causal};
  BackwardProblem clean{shape, {}, false, 1, 7}, poisoned{shape, {}, false, 1, 7};
  poisoned.k.fill_row(50, nan);
  poisoned.v.fill_row(50, inf);
  poisoned.run_forward();
  shape.batch = 2;
  BackwardProblem beside{shape, {}, false, 1, 7};  // its first batch has the same random numbers
  for (Isa const isa : available_isas()) {
    Gradients const a = run(isa, clean), b = run(isa, poisoned);
    for (int i = 0; i < 50; ++i) {
      for (int e = 0; e < 24; ++e) ASSERT_EQ(a.dq.at(0, i, 0, e), b.dq.at(0, i, 0, e)) << "row " << i;
    }
    ASSERT_TRUE(std::isnan(b.dq.at(0, 50, 0, 0)));
    BackwardProblem alone{Shape{shape}, {}, false, 1, 7};
    for (int row = 0; row < 100; ++row) {
      for (int e = 0; e < 24; ++e) alone.dout.put(1, row, 0, e, 0.5), alone.q.put(1, row, 0, e, nan);
    }
    Gradients const c = run(isa, beside), d = run(isa, alone);
    for (int i = 0; i < 100; ++i) {
      for (int e = 0; e < 24; ++e) {
        ASSERT_EQ(c.dq.at(0, i, 0, e), d.dq.at(0, i, 0, e));
        ASSERT_EQ(c.dk.at(0, i, 0, e), d.dk.at(0, i, 0, e));
        ASSERT_EQ(c.dv.at(0, i, 0, e), d.dv.at(0, i, 0, e));
      }
    }
  }
}

}  // namespace
}  // namespace flashcute::testing
