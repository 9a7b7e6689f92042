// Input checks of the C++ interface: wrong tensors are refused with the argument, what came and what is
// allowed, and nothing is written. (The Python suite goes through all of them.)
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <set>
#include <string_view>
#include <utility>
#include <vector>

#include "flashcute/api.hpp"
#include "image/embedded_images.hpp"
#include "image/image_store.hpp"
#include "launch/driver.hpp"
#include "plan/call.hpp"
#include "plan/checks.hpp"
#include "plan/memory_overlap.hpp"
#include "support/printing.hpp"

namespace flashcute {
namespace {

/// The call throws, and the message has all the words.
template <class Exception, class Call>
void expect_throw(Call const& call, std::initializer_list<char const*> words) {
  try {
    call();
    FAIL() << "no exception";
  } catch (Exception const& e) {
    for (char const* word : words) EXPECT_NE(std::string(e.what()).find(word), std::string::npos) << e.what();
  }
}

struct Problem {
  std::vector<float> memory = std::vector<float>(4096, 1.f);
  std::vector<float> output = std::vector<float>(4096, -7.f);
  TensorView q = view(memory, {1, 4, 2, 8}), k = view(memory, {1, 5, 1, 8}), v = view(memory, {1, 5, 1, 8});
  TensorView out = view(output, {1, 4, 2, 8});
  TensorView const* block_counts = nullptr;
  CallOptions options;
  ForwardConfig config = default_config(DType::float32, 8, cpu_arch);

  static TensorView view(std::vector<float>& memory, std::array<int64_t, 4> shape) {
    TensorView t;
    t.data = memory.data();
    t.rank = 4;
    t.shape = shape;
    t.strides = {shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1};
    return t;
  }

  void run() { forward(config, q, k, v, out, nullptr, options, block_counts); }

  template <class Exception>
  void expect(std::initializer_list<char const*> words) {
    expect_throw<Exception>([&] { run(); }, words);
    for (float x : output) ASSERT_EQ(x, -7.f) << "something was written";
  }
};

TEST(Plan, GoodInputRuns) {
  Problem p;
  p.run();
  EXPECT_FLOAT_EQ(p.output[0], 1.f);
  EXPECT_FLOAT_EQ(p.output[63], 1.f);
  EXPECT_EQ(p.output[64], -7.f) << "written past the end";
}

// Guards against empty arrays that are refused: libraries differ in the strides that they give these.
TEST(Plan, StridesOfAnEmptyTensorMeanNothing) {
  Problem p;
  TensorView lse = Problem::view(p.output, {0, 2, 4, 1});
  lse.rank = 3;
  for (TensorView* t : {&p.q, &p.k, &p.v, &p.out, &lse}) {
    t->shape[0] = 0;
    t->strides = {};
  }
  forward(p.config, p.q, p.k, p.v, p.out, &lse, p.options, nullptr);
  EXPECT_EQ(p.output[0], -7.f);
}

// Guards against a diagonal that is taken for another, or wraps: with equal scores a row is the mean of what it sees.
TEST(Plan, TheDiagonalSaysWhatARowSees) {
  constexpr int64_t least = std::numeric_limits<int64_t>::min(), most = std::numeric_limits<int64_t>::max();
  for (std::optional<int64_t> const diagonal :
       {std::optional<int64_t>(), {0}, {-1}, {-3}, {2}, {100}, {-100}, {least}, {most}}) {
    Problem p;
    std::vector<float> zeros(4096, 0.f), values(4096);
    for (int key = 0; key < 5; ++key)
      std::fill_n(&values[static_cast<std::size_t>(key) * 8], 8, static_cast<float>(key));
    p.q.data = zeros.data();
    p.v.data = values.data();
    p.options.causal = true;
    p.options.diagonal = diagonal;
    p.run();
    for (int64_t row = 0; row < 4; ++row) {
      int64_t const last = std::min<int64_t>(4, row + std::clamp<int64_t>(diagonal.value_or(1), -100, 100));
      EXPECT_FLOAT_EQ(p.output[static_cast<std::size_t>(row) * 16], last < 0 ? 0.f : static_cast<float>(last) / 2)
          << row;
    }
  }
}

// Guards against kernels of the band for windows that hide nothing, which are slower and may have to be compiled first,
// and against other masks for windows that hide something.
TEST(Plan, AWindowThatHidesNothingIsAnEasierMask) {
  constexpr int64_t most = std::numeric_limits<int64_t>::max();
  using Bound = std::optional<int64_t>;
  struct Case {
    bool causal;
    Bound left, right;
    MaskKind mask;
  };
  // 4 queries, 5 keys: query 0 stands at key 1, query 3 at key 4.
  for (auto const& [causal, left, right, mask] : {
           Case{false, {}, {}, MaskKind::full},
           Case{false, {4}, {3}, MaskKind::full},
           Case{false, {most}, {most}, MaskKind::full},
           Case{false, {}, {3}, MaskKind::full},
           Case{false, {}, {2}, MaskKind::causal},
           Case{false, {4}, {0}, MaskKind::causal},
           Case{false, {3}, {3}, MaskKind::band},
           Case{false, {3}, {}, MaskKind::band},
           Case{true, {}, {}, MaskKind::causal},
           Case{true, {}, {7}, MaskKind::causal},
           Case{true, {4}, {}, MaskKind::causal},
           Case{true, {3}, {0}, MaskKind::band},
       }) {
    Problem p;
    p.options.causal = causal;
    p.options.window_left = left;
    p.options.window_right = right;
    EXPECT_EQ(checked_call(p.q, p.k, p.v, p.options).mask(), mask)
        << causal << " " << left.value_or(-1) << " " << right.value_or(-1);
  }
  Problem p;
  p.options.window_left = -2;
  p.expect<ArgumentError>({"window", ">= 0", "-2"});
}

TEST(Plan, WrongTensorsAreRefused) {
  {
    Problem p;
    p.q.rank = 5;  // more dimensions than a view can hold
    p.expect<ArgumentError>({"q", "4 dimensions", "5"});
  }
  {
    Problem p;
    p.k.dtype = ElementType::float64;
    p.expect<ArgumentError>({"k", "float32", "float64"});
  }
  {
    Problem p;
    p.v.device = {DeviceType::cuda, 1};
    p.expect<ArgumentError>({"v", "cpu", "cuda:1"});
  }
  {
    Problem p;
    p.v.shape[1] = 6;
    p.expect<ArgumentError>({"v", "seqlen 5", "6"});
  }
  {
    Problem p;
    p.k.shape[2] = p.v.shape[2] = 3;
    p.expect<ArgumentError>({"k", "divides", "3"});
  }
  {
    Problem p;
    p.q.strides[3] = 2;
    p.expect<ArgumentError>({"q", "last stride 1", "2"});
  }
  {
    Problem p;
    p.out.read_only = true;
    p.expect<ArgumentError>({"out", "writable"});
  }
  {
    Problem p;
    p.out.strides[1] = 0;
    p.expect<ArgumentError>({"out", "stride 0", "address of its own"});
  }
  {
    Problem p;
    p.options.scale = std::numeric_limits<double>::quiet_NaN();
    p.expect<ArgumentError>({"scale", "finite"});
  }
  {
    Problem p;
    p.config.head_dim = 4;
    p.expect<ConfigError>({"cfg", "head_dim 4", "8"});
  }
  {
    Problem p;
    p.config.head_dim_v = 4;
    p.expect<ConfigError>({"cfg", "head_dim_v 4", "8"});
  }
  {
    Problem p;
    p.v.shape[3] = 4;
    p.expect<ArgumentError>({"out", "(1, 4, 2, 4)", "v's head_dim", "(1, 4, 2, 8)"});
  }
  {
    // A head dim that is no multiple of an element of another, wider dtype.
    Problem p;
    for (TensorView* t : {&p.q, &p.k, &p.v, &p.out}) t->shape[3] = 6;
    for (TensorView* t : {&p.q, &p.k, &p.v, &p.out}) t->dtype = ElementType::float16;
    p.v.dtype = ElementType::float64;
    EXPECT_THROW(config_for(p.q, p.k, p.v, &p.out), ArgumentError);
    p.config = default_config(DType::float16, 6, cpu_arch);
    p.expect<ArgumentError>({"v", "float16", "float64"});
  }
  {
    Problem p;
    p.q.dtype = ElementType::int32;
    p.expect<ArgumentError>({"q", "float32", "int32"});
  }
  {
    Problem p;
    TensorView counts = p.out;
    p.block_counts = &counts;
    p.expect<ArgumentError>({"block_counts", "int32", "float32"});
  }
  {
    Problem p;
    p.config.dtype = DType::float64;
    p.expect<ConfigError>({"cfg", "float64", "float32"});
  }
}

// Guards against sizes whose product is no 64-bit number: where it wrapped to 0, a tensor without memory and with any
// strides counted as empty.
TensorView int32_view(std::vector<int32_t>& memory) {
  TensorView t;
  t.data = memory.data();
  t.dtype = ElementType::int32;
  t.rank = 1;
  t.shape = {static_cast<int64_t>(memory.size())};
  t.strides = {1};
  return t;
}

/// Without the batch dimension.
TensorView packed_view(TensorView t) {
  t.rank = 3;
  t.shape = {t.shape[1], t.shape[2], t.shape[3]};
  t.strides = {t.strides[1], t.strides[2], 1};
  return t;
}

// Guards against sequences that see each other: with equal scores a row is the mean of what it sees.
TEST(Plan, PackedSequencesAreComputedApart) {
  Problem p;
  for (std::size_t row = 0; row < 5; ++row) std::fill_n(&p.memory[row * 8], 8, static_cast<float>(row));
  p.v = p.k;
  std::vector<float> zeros(64, 0.f);
  p.q = packed_view(Problem::view(zeros, {1, 4, 2, 8}));
  p.k = p.v = packed_view(p.k);
  p.out = packed_view(p.out);
  std::vector<int32_t> starts_q{0, 1, 3}, starts_k{0, 2, 5};
  TensorView const q_view = int32_view(starts_q), k_view = int32_view(starts_k);
  p.options.cu_seqlens_q = &q_view;
  p.options.cu_seqlens_k = &k_view;
  p.run();
  float const expected[] = {0.5f, 3.f, 3.f, 0.f};  // of rows 0 to 3; the last is of no sequence
  for (std::size_t row = 0; row < 4; ++row) {
    for (std::size_t i = 0; i < 16; ++i) EXPECT_FLOAT_EQ(p.output[16 * row + i], expected[row]) << "row " << row;
  }
}

TEST(Plan, WrongPackedSequencesAreRefused) {
  std::vector<int32_t> starts{0, 1, 4}, fewer{0, 4}, none;
  TensorView const view = int32_view(starts), fewer_view = int32_view(fewer), empty = int32_view(none);
  auto const with = [&](auto const& change) {
    Problem p;
    for (TensorView* t : {&p.q, &p.k, &p.v, &p.out}) *t = packed_view(*t);
    p.options.cu_seqlens_q = &view;
    change(p);
    return p;
  };
  with([](Problem&) {}).run();
  with([](Problem& p) { p.q = Problem{}.q; }).expect<ArgumentError>({"q: expected 3 dimensions (total, heads,"});
  with([](Problem& p) { p.out.rank = 2; }).expect<ArgumentError>({"out: expected 3 dimensions"});
  with([&](Problem& p) {
    p.options.cu_seqlens_k = &fewer_view;
  }).expect<ArgumentError>({"cu_seqlens_k: expected", "(sequences + 1,) = (3)"});
  with([&](Problem& p) { p.options.seqlens_q = &view; }).expect<ArgumentError>({"seqlens_q", "(sequences,) = (2)"});
  with([&](Problem& p) { p.options.cu_seqlens_q = &empty; }).expect<ArgumentError>({"cu_seqlens_q", "sequences + 1"});
  Problem alone;
  alone.options.cu_seqlens_k = &view;
  alone.expect<ArgumentError>({"cu_seqlens_k: expected none without cu_seqlens_q"});
}

TEST(Plan, SizesAndStridesBeyond64BitsAreRefused) {
  constexpr int64_t large = int64_t{1} << 30;
  for (auto const& [argument, tensor] : {std::pair{"q", &Problem::q}, {"k", &Problem::k}, {"v", &Problem::v}}) {
    for (int64_t const heads : {16, 1}) {  // 2^67 elements, and 2^63
      Problem p;
      TensorView& t = p.*tensor;
      t.data = nullptr;
      t.shape = {large, large, heads, 8};
      t.strides = {0, 0, 0, 2};
      p.expect<ArgumentError>({argument, "at most 1152921504606846975 elements", shape_text(t).c_str()});
      EXPECT_THROW(check_problem(p.q, p.k, p.v), ArgumentError);
    }
  }
  {
    Problem p;  // a factor of 0 is enough: there is nothing to compute
    p.q.shape = p.out.shape = {large, 0, large, 8};
    p.k.shape = p.v.shape = {large, 0, 1, 8};
    p.run();
  }
  {
    Problem p;
    p.k.strides[1] = int64_t{1} << 61;  // a distance of 2^63 elements
    p.expect<ArgumentError>({"k", "strides that keep any two elements within", "(1, 5, 1, 8)", "2305843009213693952"});
    p.k.strides[1] = std::numeric_limits<int64_t>::min();
    p.expect<ArgumentError>({"k", "strides that keep any two elements within"});
    p.k.strides = {std::numeric_limits<int64_t>::max(), 8, std::numeric_limits<int64_t>::min(), 1};
    p.run();  // of dimensions that are never stepped over
  }
}

/// A small tensor over `memory` with any strides, for brute force.
TensorView strided(std::vector<float>& memory, int64_t offset, std::array<int64_t, 4> shape,
                   std::array<int64_t, 4> strides) {
  TensorView t = Problem::view(memory, shape);
  t.data = memory.data() + offset;
  t.strides = strides;
  return t;
}

std::vector<int64_t> addresses(TensorView const& t, std::vector<float> const& memory) {
  std::vector<int64_t> all;
  for (int64_t a = 0; a < t.shape[0]; ++a)
    for (int64_t b = 0; b < t.shape[1]; ++b)
      for (int64_t c = 0; c < t.shape[2]; ++c)
        for (int64_t d = 0; d < t.shape[3]; ++d)
          all.push_back(static_cast<float const*>(t.data) - memory.data() + a * t.strides[0] + b * t.strides[1] +
                        c * t.strides[2] + d * t.strides[3]);
  return all;
}

// Guards against a missed overlap (silently wrong results) and, for equal strides, against a false one: all small
// tensors by brute force.
TEST(MemoryOverlap, AgreesWithBruteForce) {
  std::vector<float> memory(512);
  int shared = 0, separate = 0;
  for (std::array<int64_t, 4> const strides : {std::array<int64_t, 4>{48, 16, 4, 1}, {4, 48, 16, 1}, {50, -15, 4, 1}}) {
    for (std::array<int64_t, 4> const shape : {std::array<int64_t, 4>{2, 3, 3, 4}, {2, 3, 2, 3}, {1, 2, 1, 2}}) {
      TensorView const a = strided(memory, 200, shape, strides);
      ASSERT_FALSE(overlapping_dimension(a));
      auto const in_a = addresses(a, memory);
      for (int64_t offset = 40; offset < 360; ++offset) {
        TensorView const b = strided(memory, offset, {2, 3, 2, 4}, strides);
        auto const in_b = addresses(b, memory);
        bool const truth = std::any_of(in_a.begin(), in_a.end(),
                                       [&](int64_t x) { return std::find(in_b.begin(), in_b.end(), x) != in_b.end(); });
        ASSERT_EQ(may_share_an_element(a, b), truth) << offset;
        ++(truth ? shared : separate);
      }
    }
  }
  EXPECT_GT(shared, 100);
  EXPECT_GT(separate, 100);
  EXPECT_EQ(overlapping_dimension(strided(memory, 0, {2, 3, 2, 4}, {48, 7, 4, 1})), 1u);
  EXPECT_EQ(overlapping_dimension(strided(memory, 0, {2, 0, 2, 4}, {0, 0, 0, 0})), std::nullopt);
}

// Guards against a wrapped extent, which finds memory apart that is not, and against a rank that the arrays of a view
// do not hold.
TEST(MemoryOverlap, NeedsNoTensorThatWasChecked) {
  std::vector<float> memory(512);
  constexpr int64_t most = std::numeric_limits<int64_t>::max();
  TensorView const small = strided(memory, 0, {1, 1, 2, 4}, {8, 8, 4, 1});
  for (int64_t const stride : {int64_t{1} << 61, most, -most, -most - 1}) {
    TensorView const far = strided(memory, 0, {1, 9, 2, 4}, {1, stride, 4, 1});
    EXPECT_TRUE(may_share_an_element(small, far)) << stride;
    EXPECT_TRUE(may_share_an_element(far, far)) << stride;
    EXPECT_EQ(overlapping_dimension(far), std::nullopt) << stride;
    TensorView const twice = strided(memory, 0, {9, 9, 2, 4}, {stride, stride, 4, 1});
    EXPECT_TRUE(overlapping_dimension(twice).has_value()) << stride;
  }
  TensorView odd = small;
  for (int const rank : {-1, 5, 1 << 30}) {
    odd.rank = rank;
    EXPECT_TRUE(may_share_an_element(odd, small));
    EXPECT_TRUE(may_share_an_element(odd, odd));
    EXPECT_EQ(overlapping_dimension(odd), std::nullopt);
  }
}

// Guards against an output that overwrites inputs while they are read, and against refusing packed tensors, whose
// elements interleave but are all different.
TEST(Plan, OutMayShareAnAllocationButNoElement) {
  std::vector<float> memory(4096, 0.5f);
  auto const packed = [&](int64_t which) {  // (batch 2, seqlen 4, 4 tensors, heads 2, d 8)
    TensorView t = Problem::view(memory, {2, 4, 2, 8});
    t.strides = {4 * 64, 64, 8, 1};
    t.data = memory.data() + 16 * which;
    return t;
  };
  ForwardConfig const config = default_config(DType::float32, 8, cpu_arch);
  forward(config, packed(0), packed(1), packed(2), packed(3), nullptr);
  EXPECT_THROW(forward(config, packed(0), packed(1), packed(2), packed(2), nullptr), ArgumentError);
  TensorView shifted = packed(2);
  shifted.data = memory.data() + 16 * 2 + 64;  // one row further
  EXPECT_THROW(forward(config, packed(0), packed(1), packed(2), shifted, nullptr), ArgumentError);
}

/// A call of `backward` that works, with gradients full of a sentinel.
struct BackwardProblem {
  std::vector<float> memory = std::vector<float>(4096, 0.5f);
  std::vector<float> dq_memory = std::vector<float>(64, -7.f), dk_memory = std::vector<float>(40, -7.f),
                     dv_memory = std::vector<float>(40, -7.f);
  TensorView q = Problem::view(memory, {1, 4, 2, 8}), k = Problem::view(memory, {1, 5, 1, 8}), v = k;
  TensorView out = q, dout = q, lse = rows_of(memory), dlse = rows_of(memory);
  TensorView dq = Problem::view(dq_memory, {1, 4, 2, 8}), dk = Problem::view(dk_memory, {1, 5, 1, 8}),
             dv = Problem::view(dv_memory, {1, 5, 1, 8});
  CallOptions options;
  BackwardConfig config = default_backward_config(DType::float32, 8, cpu_arch);

  static TensorView rows_of(std::vector<float>& memory) {
    TensorView t;
    t.data = memory.data();
    t.rank = 3;
    t.shape = {1, 2, 4};
    t.strides = {8, 4, 1};
    return t;
  }

  void run() { backward(config, dout, q, k, v, out, lse, &dlse, dq, dk, dv, options); }

  template <class Exception>
  void expect(std::initializer_list<char const*> words) {
    expect_throw<Exception>([&] { run(); }, words);
    for (auto const* memory : {&dq_memory, &dk_memory, &dv_memory}) {
      for (float x : *memory) ASSERT_EQ(x, -7.f) << "something was written";
    }
  }
};

// The checks of the backward, of which the Python suite goes through all: wrong tensors computed with, copies made
// silently, a GPU's tensors read on the CPU.
TEST(PlanBackward, WrongTensorsAreRefused) {
  {
    BackwardProblem p;
    p.run();
    for (auto const* memory : {&p.dq_memory, &p.dk_memory, &p.dv_memory}) {
      for (float x : *memory) ASSERT_NE(x, -7.f);
    }
  }
  {
    BackwardProblem p;
    p.dout.strides[3] = 2;
    p.expect<ArgumentError>({"dout", "last stride 1", "2", "contiguous"});
  }
  {
    BackwardProblem p;
    p.dout.shape[1] = 3;
    p.expect<ArgumentError>({"dout", "(1, 4, 2, 8)", "(1, 3, 2, 8)"});
  }
  {
    BackwardProblem p;
    p.lse.strides[2] = 2;
    p.expect<ArgumentError>({"lse", "contiguous", "(batch, heads, seqlen_q)"});
  }
  {
    BackwardProblem p;
    p.dlse.strides = {0, 0, 0, 0};  // of any strides
    p.run();
    p.dlse.dtype = ElementType::float64;
    p.dq_memory.assign(64, -7.f), p.dk_memory.assign(40, -7.f), p.dv_memory.assign(40, -7.f);
    p.expect<ArgumentError>({"dlse", "float32", "float64"});
  }
  {
    BackwardProblem p;
    p.dv = p.dk;
    p.expect<ArgumentError>({"dv", "memory that dk uses too"});
  }
  {
    BackwardProblem p;
    p.dq.data = p.memory.data();
    p.expect<ArgumentError>({"dq", "memory of its own", "memory that q uses too"});
  }
  {
    BackwardProblem p;
    p.dk.read_only = true;
    p.expect<ArgumentError>({"dk", "writable"});
  }
  {
    BackwardProblem p;
    p.config.head_dim_v = 4;
    p.expect<ConfigError>({"cfg", "head_dim_v 4", "8"});
  }
  {
    BackwardProblem p;
    p.config.block_n = 24;
    p.expect<ConfigError>({"cfg", "block_n", "block_n=24"});
  }
}

// The CPU makes its own.
TEST(PlanBackward, TheCpuNeedsNoWorkspace) {
  BackwardProblem p;
  EXPECT_EQ(backward_workspace_size(std::nullopt, p.q, p.v), 0);
  EXPECT_EQ(backward_config_for(p.q, p.k, p.v), p.config);
  p.options.deterministic = true;
  EXPECT_TRUE(backward_config_for(p.q, p.k, p.v, {}, p.options).deterministic);
}

// A rule that no configuration breaks on the CPU, names that collide.
TEST(BackwardConfig, RulesAndNames) {
  BackwardConfig c;
  EXPECT_EQ(check(c, cpu_arch), BackwardConfigError::none);
  auto const broken = [&](auto change) {
    BackwardConfig other = c;
    change(other);
    return check(other, cpu_arch);
  };
  EXPECT_EQ(broken([](BackwardConfig& x) { x.head_dim = 257; }), BackwardConfigError::head_dim);
  EXPECT_EQ(broken([](BackwardConfig& x) { x.head_dim_v = 0; }), BackwardConfigError::head_dim);
  EXPECT_EQ(broken([](BackwardConfig& x) { x.block_m = 24; }), BackwardConfigError::block_m);
  EXPECT_EQ(broken([](BackwardConfig& x) { x.block_n = 272; }), BackwardConfigError::block_n);
  EXPECT_STREQ(name(c).text, "bwd_bf16_d128_m64_n64_w4");
  c.head_dim_v = 64;
  c.deterministic = true;
  EXPECT_STREQ(name(c).text, "bwd_bf16_d128_dv64_m64_n64_w4_deterministic");
}

// Guards against a crash deep in the driver where the images are too new for it.
TEST(Driver, TooOldADriverIsRefusedWithWhatToDo) {
  cuda::require_driver_for(13000, 13000);
  cuda::require_driver_for(12080, 13000);
  cuda::require_driver_for(12080, 12020);  // minor versions are compatible
  try {
    cuda::require_driver_for(13000, 12080);
    FAIL() << "no exception";
  } catch (DeviceError const& e) {
    for (char const* word : {"13.0", "12.8", "580", "FLASHCUTE_JIT=force"}) {
      EXPECT_NE(std::string(e.what()).find(word), std::string::npos) << e.what();
    }
  }
}

// Guards against a family that has lost its image, or has another's.
TEST(ImageStore, EachFamilyHasAnImageOfItsOwn) {
  bool const images = !image_archs().empty(), hoppers = source_among(image_archs(), 90) == ImageSource::library;
  std::set<char const*> places;
  auto const look_at = [&](auto const& families) {
    for (auto const& family : families) {
      bool const hopper = family.name.find("_sm90_") != std::string_view::npos;
      std::string_view const image = embedded_image(family);
      EXPECT_TRUE(image.empty() || places.insert(image.data()).second) << family.name;
      if (hopper) {
        EXPECT_TRUE(image.empty() || hoppers) << family.name;
      } else {
        EXPECT_EQ(image.empty(), !images) << family.name;
      }
    }
  };
  look_at(forward_families);
  look_at(backward_families);
}

// Guards against an image that is taken for a GPU it cannot run on, or not taken where it can.
TEST(ImageStore, ImagesServeTheirMajorVersionAndPtxServesLater) {
  constexpr ImageSource none = ImageSource::none, ptx = ImageSource::ptx, code = ImageSource::library;
  EXPECT_EQ(source_among("80 90", 80), code);
  EXPECT_EQ(source_among("80 90", 86), code);
  EXPECT_EQ(source_among("80 90", 90), code);
  EXPECT_EQ(source_among("80 90", 100), none);
  EXPECT_EQ(source_among("86", 80), none);
  EXPECT_EQ(source_among("80-ptx", 100), ptx);
  EXPECT_EQ(source_among("100 80-ptx", 100), code);
  EXPECT_EQ(source_among("80-ptx 100", 100), code);
  EXPECT_EQ(source_among("90-ptx", 89), none);
  EXPECT_EQ(source_among("", 80), none);
}

}  // namespace
}  // namespace flashcute
