// What the CPU backend computes, against the naive reference. Every test names the failure that it guards
// against.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/cpu_problem.hpp"

namespace flashcute::testing {
namespace {

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

// Guards against v and the output taken for as wide as q and k.
TEST(CpuForward, HeadDimsOfValues) {
  for (DType const dtype : all_dtypes) {
    for (MaskKind const mask : all_masks) {
      for (auto const& [d, d_v] : {std::pair(8, 13), {1, 256}, {256, 1}, {72, 64}}) {
        Problem problem{
            Shape{.dtype = dtype, .head_dim = d, .head_dim_v = d_v, .seqlen_q = 67, .seqlen_k = 131, .mask = mask}
                .bottom_right()};
        ASSERT_NO_FATAL_FAILURE(check(problem));
      }
    }
  }
}

// A head dim that the register tiles do not divide: columns dropped, or read past the end of the row.
TEST(CpuForward, EveryKindOfHeadDim) {
  for (DType const dtype : all_dtypes) {
    for (MaskKind const mask : all_masks) {
      for (int const d : {1, 2, 3, 5, 7, 8, 13, 40, 64, 72, 104, 128, 200, 255, 256}) {
        Problem problem{Shape{
            .dtype = dtype, .head_dim = d, .seqlen_q = 67, .seqlen_k = 131, .mask = mask, .scale = 1 / std::sqrt(d)}
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
// from some or all rows or show all.
TEST(CpuForward, CausalOffsets) {
  for (int const offset : {-1000, -65, -64, -63, -1, 0, 1, 13, 63, 64, 1000}) {
    Problem problem{
        Shape{.head_dim = 8, .seqlen_q = 130, .seqlen_k = 90, .mask = MaskKind::causal, .causal_offset = offset}};
    ASSERT_NO_FATAL_FAILURE(check(problem));
  }
}

// Windows that end at one or the other side of a tile's and a block's edges; queries that see no key, at either end.
TEST(CpuForward, Windows) {
  for (DType const dtype : all_dtypes) {
    for (int const first : {-140, -64, -10, 0, 70}) {
      for (int const size : {0, 1, 63, 64, 100, 220}) {
        Problem problem{Shape{.dtype = dtype,
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
// width; a head that sees another's map; NaN in a key that only some queries see, or in a query. Queries and keys
// without anybody are among them.
TEST(CpuForward, Maps) {
  for_each_mapped_shape({60, 1000}, [](Shape const& shape) {
    Problem problem{shape};
    put_special_values(problem);
    ASSERT_NO_FATAL_FAILURE(check(problem));
  });
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
    Shape const shape{
        .dtype = DType::bfloat16, .head_dim = d, .batch = n, .heads = n, .kv_heads = n, .seqlen_q = n, .seqlen_k = n};
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
          Problem problem{
              Shape{.dtype = dtype, .head_dim = 24, .seqlen_q = 100, .seqlen_k = 100, .mask = MaskKind::causal}};
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

// The same beside a window: the keys before the first query's, and those after the last query's.
TEST(CpuForward, KeysBesideAWindowAreNaN) {
  for (DType const dtype : all_dtypes) {
    Problem problem{Shape{.dtype = dtype,
                          .head_dim = 24,
                          .seqlen_q = 70,
                          .seqlen_k = 203,
                          .mask = MaskKind::band,
                          .causal_offset = 90,
                          .window_offset = 50}};
    for (int row = 0; row < 203; ++row) {
      if (row < 50 || row >= 160) problem.k.fill_row(row, nan), problem.v.fill_row(row, nan);
    }
    for (long double const x : reference(problem).out) ASSERT_TRUE(std::isfinite(x));
    ASSERT_NO_FATAL_FAILURE(check(problem));
  }
}

// The bits of a row must not depend on whether its block took the path for values that are not finite.
TEST(CpuForward, UnseenPoisonChangesNoBit) {
  Shape const shape{
      .head_dim = 24, .heads = 1, .kv_heads = 1, .seqlen_q = 100, .seqlen_k = 100, .mask = MaskKind::causal};
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
        Problem problem{
            Shape{.dtype = dtype, .head_dim = 1, .seqlen_q = 70, .seqlen_k = 150, .mask = mask}.bottom_right()};
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

// The scale multiplied into q overflows, or the product of q and k without it, though no score does; or what is left
// of a small q has lost its digits. Either makes NaN, or wrong scores, of inputs that are all finite.
TEST(CpuForward, SizesThatOnlyTheScoreMakesUpFor) {
  struct Sizes {
    DType dtype;
    double q, k, scale;
  };
  std::vector<Sizes> const cases = {
      {DType::float32, 5e37, 2e-38, 10},     {DType::float32, 2e-38, 5e37, 10},    {DType::float32, 1e38, 1, 1e-38},
      {DType::float32, 1, 1e38, 1e-38},      {DType::float32, 1e19, 1e19, 1e-38},  {DType::float32, 1e30, 1e25, 1e-55},
      {DType::float32, 1e-30, 1e-8, 1e38},   {DType::float32, 1e-42, 1e37, 1e5},   {DType::float32, 1e-20, 1e38, 1e-18},
      {DType::bfloat16, 5e37, 2e-38, 10},    {DType::bfloat16, 1e30, 1e25, 1e-55}, {DType::float64, 5e306, 2e-308, 10},
      {DType::float64, 1e200, 1e150, 1e-300}};
  for (Sizes const& c : cases) {
    for (MaskKind const mask : all_masks) {
      Shape const shape{
          .dtype = c.dtype, .head_dim = 4, .seqlen_q = 70, .seqlen_k = 140, .mask = mask, .scale = c.scale};
      Problem problem{shape};
      std::mt19937 random{1};
      std::normal_distribution<double> normal;
      problem.q.fill([&] { return c.q * std::clamp(normal(random), -2.0, 2.0); });
      problem.k.fill([&] { return c.k * std::clamp(normal(random), -2.0, 2.0); });
      SCOPED_TRACE(std::to_string(std::log10(c.q)) + " " + std::to_string(std::log10(c.k)));
      ASSERT_NO_FATAL_FAILURE(check(problem, {}, 4));
    }
  }
}

// Rounding errors that grow with the number of keys, because block after block is added to one sum.
TEST(CpuForward, AMillionKeys) {
  for (DType const dtype : {DType::float32, DType::float64}) {
    for (MaskKind const mask : all_masks) {
      Problem problem{Shape{
          .dtype = dtype, .head_dim = 2, .heads = 1, .kv_heads = 1, .seqlen_q = 3, .seqlen_k = 1 << 20, .mask = mask}
                          .bottom_right()};
      std::mt19937 random{1};
      std::normal_distribution<double> normal{1};
      problem.v.fill([&] { return normal(random); });
      ASSERT_NO_FATAL_FAILURE(check(problem, {}, 0.05));
    }
  }
}

// Totals of earlier blocks that are not brought to a maximum which is found later, or lost where one row of a tile
// meets it and another does not.
TEST(CpuForward, MaximumMovesAfterManyBlocks) {
  Problem problem{Shape{.head_dim = 2, .seqlen_q = 20, .seqlen_k = 64 * 200, .scale = 1}};
  for (int i = 0; i < 20; ++i) problem.q.fill_row(i, i % 3 - 1);
  for (int j = 0; j < 64 * 200; ++j) problem.k.fill_row(j, 6 * std::sin(j / 1300.0));
  ASSERT_NO_FATAL_FAILURE(check(problem, {}, 10));
}

// An infinite value among totals: beside it, what its addition rounds off is NaN.
TEST(CpuForward, InfiniteValuesAmongManyBlocks) {
  for (int const row : {0, 5000, 64 * 150 - 1}) {
    Problem problem{Shape{.head_dim = 2, .seqlen_q = 20, .seqlen_k = 64 * 150}};
    problem.v.put(0, row, 1, 1, inf);
    problem.q.fill([] { return 0.0; });
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
    Problem problem{
        Shape{.dtype = dtype, .head_dim = 256, .batch = 256, .heads = 1, .kv_heads = 1, .seqlen_q = 1, .seqlen_k = 1}};
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
    Problem problem{Shape{.dtype = dtype,
                          .head_dim = 256,
                          .batch = 128,
                          .heads = 1,
                          .kv_heads = 1,
                          .seqlen_q = 1,
                          .seqlen_k = 2,
                          .scale = 0}};
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

}  // namespace
}  // namespace flashcute::testing
