// The backward kernels, run on the host by emulated thread blocks: all passes of a call, against gradients in fp64.
#include "flashcute/sm80/backward_passes.hpp"
#include "kernel/backward_problem.hpp"
#include "kernel/kernel_run.hpp"

namespace flashcute {
namespace {

/// The same by the sm80 kernels.
template <BackwardConfig B, MaskKind Kind>
class BackwardProblem : public BackwardCall<B, Kind> {
  using Call = BackwardCall<B, Kind>;

 public:
  using Call::Call;
  using Call::s_;

  /// The output and LSE of the inputs as they are, then all passes.
  void run(uint64_t seed) {
    Call::compute_forward();
    BackwardParams const p = Call::params();
    if constexpr (B.deterministic) {
      run_pass<BackwardPass::queries>(p, seed);
      run_pass<BackwardPass::keys>(p, seed + 1);
    } else {
      run_pass<BackwardPass::prepare>(p, seed);
      run_pass<BackwardPass::gradients>(p, seed + 1);
      run_pass<BackwardPass::finish>(p, seed + 2);
    }
    if (!s_.sink.empty()) run_pass<BackwardPass::sink>(p, seed + 3);
  }

 private:
  template <BackwardPass Pass>
  void run_pass(BackwardParams const& p, uint64_t seed) {
    constexpr BackwardKernelId id = kernel_of(B, Pass, {Kind});
    using Kernel = BackwardKernel<id>;
    int64_t const blocks = Pass == BackwardPass::sink ? s_.heads
                           : keys_stay(Pass)          ? count_key_tiles(p.forward, B.block_n)
                                                      : count_query_tiles(p.forward, B.block_m);
    for (uint32_t block = 0; block < blocks; ++block) {
      GlobalMemory memory;
      if (Pass == BackwardPass::sink) {
        Call::allow_sink(memory, static_cast<int>(block));
      } else if (keys_stay(Pass)) {
        Call::allow_keys(memory, Call::Keys::at(p.forward, block, B.block_n));
      } else {
        Call::allow_queries(memory, Pass, Call::Queries::at(p.forward, block, B.block_m));
      }
      using Storage = typename Kernel::SharedStorage;
      emulation::run_block(block, num_threads(id), sizeof(Storage), seed + block, memory,
                           [&](void* shared) { Kernel::run(p, *static_cast<Storage*>(shared)); });
      ASSERT_EQ(memory.count(Use::output), 0u) << "bytes of the gradients that were never stored";
    }
  }
};

template <BackwardConfig B, MaskKind Kind>
void check_gradients(BackwardProblem<B, Kind>& problem) {
  if (testing::Test::HasFailure()) return;
  try {
    ASSERT_NO_FATAL_FAILURE(problem.run(1));
    problem.expect_right();
  } catch (emulation::Violation const& e) {
    FAIL() << name(B).text << ": " << e.what();
  }
}

constexpr BackwardConfig small = {.dtype = bf16, .head_dim = 64, .block_m = 32, .block_n = 64};
constexpr BackwardConfig small_shared = {
    .dtype = bf16, .head_dim = 64, .block_m = 32, .block_n = 64, .column_warps = 2, .stages = 1};
constexpr BackwardConfig small_deterministic = {
    .dtype = bf16, .head_dim = 64, .block_m = 64, .block_n = 64, .stages = 1, .deterministic = true};
constexpr BackwardConfig small_f32 = {
    .dtype = f32, .head_dim = 64, .block_m = 32, .block_n = 64, .math = Math::tf32x3, .stages = 1};
constexpr BackwardConfig small_f32_shared = {
    .dtype = f32, .head_dim = 64, .block_m = 32, .block_n = 64, .column_warps = 2, .math = Math::tf32x3};
constexpr BackwardConfig small_f32_deterministic = {.dtype = f32,
                                                    .head_dim = 64,
                                                    .block_m = 64,
                                                    .block_n = 64,
                                                    .math = Math::tf32x3,
                                                    .stages = 1,
                                                    .deterministic = true};

// Blocks of queries that are parts of a cell, and as large; warps that share columns; keys of two cells.
constexpr BackwardConfig small_wide = {.dtype = bf16, .head_dim = 64, .block_m = 64, .block_n = 128, .stages = 1};

template <BackwardConfig B>
void check_block_maps() {
  for (auto const& [batch, heads] : {std::pair{1, 1}, {2, 4}}) {
    Shape s{.sq = 140, .sk = 200, .d = 40, .batch = 2, .heads = 4, .kv_heads = 2};
    s.causal_offset = 200, s.window_offset = -140;
    s.map = MapProblem::random(batch, heads, s.sq, s.sk, 11);
    BackwardProblem<B, MaskKind::mapped> problem(s, true);
    check_gradients(problem);
  }
  Shape s{.sq = 130, .sk = 150, .d = 64, .batch = 2, .heads = 2, .kv_heads = 1};
  s.causal_offset = 30, s.window_offset = -60, s.from_end = true;
  s.seqlens_q = {130, 70}, s.seqlens_k = {150, 100};
  s.sink = {0.5f, -1};
  s.map = MapProblem::random(1, 2, s.sq, s.sk, 12);
  BackwardProblem<B, MaskKind::mapped> problem(s);
  problem.problem.poison_absent();
  check_gradients(problem);
}

// Guards against a block of another head that is left out because one head does not see it, blocks in the wrong place
// of shared memory, bits of another row or column, and gradients of keys that nobody sees.
TEST(BackwardKernel, BlockMaps) {
  check_block_maps<small>();
  check_block_maps<small_wide>();
}
TEST(BackwardKernel, BlockMapsWithColumnsShared) { check_block_maps<small_shared>(); }
TEST(BackwardKernel, BlockMapsDeterministic) { check_block_maps<small_deterministic>(); }
TEST(BackwardKernel, BlockMapsInFloat32) { check_block_maps<small_f32>(); }

// Guards against NaN in hidden rows of any input, which a product would spread.
TEST(BackwardKernel, NanThatAMapHides) {
  Shape s{.sq = 100, .sk = 200, .d = 64, .causal_offset = 200, .window_offset = -100};
  s.map = MapProblem::of(1, 1, s.sq, s.sk,
                         [](int, int, int i, int j) { return i % 5 != 0 && j % 3 != 0 && (j < 64 || i > 70); });
  BackwardProblem<small, MaskKind::mapped> problem(s);
  for (int j : {0, 3, 66, 150}) problem.problem.k.set_row(0, j, 0, nan), problem.problem.v.set_row(0, j, 0, nan);
  for (int i : {0, 5, 95}) problem.problem.q.set_row(0, i, 0, nan), problem.dout.set_row(0, i, 0, nan);
  check_gradients(problem);
}

template <BackwardConfig B>
void check_shapes() {
  for (Shape const& s : {Shape{.sq = B.block_m + 5, .sk = 2 * B.block_n + 7, .d = B.head_dim, .d_v = B.head_dim_v},
                         Shape{.sq = 2 * B.block_m, .sk = B.block_n, .d = B.head_dim - 8, .d_v = 8},
                         Shape{.sq = 3, .sk = 20, .d = 8, .d_v = B.head_dim_v, .heads = 2, .order = Order::padded},
                         Shape{.sq = 37, .sk = 41, .d = 16, .batch = 2, .heads = 4, .kv_heads = 2}}) {
    BackwardProblem<B, MaskKind::causal> causal(s, true);
    check_gradients(causal);
    BackwardProblem<B, MaskKind::full> full(s);
    check_gradients(full);
  }
}

// Guards against gradients that are wrong at a tile's edge, on the diagonal, for narrow or grouped heads.
TEST(BackwardKernel, Shapes) {
  check_shapes<small>();
  check_shapes<small_shared>();
  check_shapes<small_deterministic>();
  check_shapes<small_f32>();
  check_shapes<small_f32_shared>();
  check_shapes<small_f32_deterministic>();
}

template <BackwardConfig B>
BackwardProblem<B, MaskKind::full> checked(Shape const& s) {
  BackwardProblem<B, MaskKind::full> problem(s);
  check_gradients(problem);
  return problem;
}

// Guards against dS that is made from P in 16 bits where P is at hand in float32: a fifth more error in dq and dk.
TEST(BackwardKernel, ProbabilitiesAreRoundedForProductsAlone) {
  Shape const s{.sq = 200, .sk = 200, .d = 64, .heads = 2};
  auto const shared = checked<small_shared>(s);
  EXPECT_LT(shared.dq_error.relative(), 2.7e-3);
  EXPECT_LT(shared.dk_error.relative(), 2.7e-3);
  EXPECT_LT(checked<small_deterministic>(s).dq_error.relative(), 2.7e-3);
}

// Windows that end at one or the other side of a tile's and a block's edges; queries without a key, keys without a
// query.
template <BackwardConfig B>
void check_windows() {
  for (auto const& [first, size] : {std::pair(-70, 0), {-40, 33}, {-20, 90}, {0, 0}, {0, 63}, {5, 130}, {60, 64}}) {
    BackwardProblem<B, MaskKind::band> problem(
        Shape{.sq = 150, .sk = 140, .d = 32, .causal_offset = first + size, .window_offset = first});
    check_gradients(problem);
  }
  BackwardProblem<B, MaskKind::band> grouped(Shape{
      .sq = 90, .sk = 200, .d = 16, .batch = 2, .heads = 4, .kv_heads = 2, .causal_offset = 110, .window_offset = 30});
  check_gradients(grouped);
}

// Sequences shorter than their tensors: what does not exist holds NaN, and its gradients are 0.
template <BackwardConfig B>
void check_short_sequences() {
  for (int first : {-200, -60}) {
    BackwardProblem<B, MaskKind::band> problem(Shape{.sq = 140,
                                                     .sk = 130,
                                                     .d = 32,
                                                     .d_v = 24,
                                                     .batch = 6,
                                                     .heads = 2,
                                                     .kv_heads = 1,
                                                     .causal_offset = -10,
                                                     .window_offset = first,
                                                     .seqlens_q = {140, 33, 1, 0, 64, 130},
                                                     .seqlens_k = {130, 130, 40, 9, 0, 70},
                                                     .from_end = true,
                                                     .prefix = first > -100 ? std::optional(20) : std::nullopt,
                                                     .prefix_offset = -40,
                                                     .sink = {0.5f, 3}});
    problem.problem.poison_absent();
    for (int b = 0; b < 6; ++b) {
      for (int i = problem.s_.rows(b); i < problem.s_.sq; ++i) problem.dout.set_rows(b, i, nan);
    }
    check_gradients(problem);
  }
}

// The same of packed sequences: what belongs to none, or to another, is NaN.
template <BackwardConfig B>
void check_packed_sequences() {
  for (bool gaps : {false, true}) {
    Shape s{.sq = 270,
            .sk = 240,
            .d = 32,
            .d_v = 24,
            .heads = 2,
            .kv_heads = 1,
            .causal_offset = -30,
            .window_offset = gaps ? -90 : -500,
            .from_end = true,
            .prefix = gaps ? std::optional(20) : std::nullopt,
            .prefix_offset = -40,
            .sink = {0.5f, 3}};
    s.cu_seqlens_q = {3, 133, 133, 134, 166, 230, 260};
    s.cu_seqlens_k = {2, 60, 75, 75, 108, 222, 235};
    if (gaps) s.seqlens_q = {99, 3, 1, 20, 64, 0}, s.seqlens_k = {58, 15, 9, 7, 63, 13};
    BackwardProblem<B, MaskKind::band> problem(s, gaps);
    problem.problem.poison_absent();
    for (int i = 0; i < s.sq; ++i) {
      if (!s.row_exists(0, i)) problem.dout.set_rows(0, i, nan);
    }
    check_gradients(problem);
  }
}

TEST(BackwardKernel, PackedSequences) {
  check_packed_sequences<small>();
  check_packed_sequences<small_shared>();
  check_packed_sequences<small_deterministic>();
  check_packed_sequences<small_f32>();
  check_packed_sequences<small_f32_shared>();
  check_packed_sequences<small_f32_deterministic>();
}

TEST(BackwardKernel, ShortSequences) {
  check_short_sequences<small>();
  check_short_sequences<small_shared>();
  check_short_sequences<small_deterministic>();
  check_short_sequences<small_f32>();
  check_short_sequences<small_f32_shared>();
  check_short_sequences<small_f32_deterministic>();
}

TEST(BackwardKernel, Windows) {
  check_windows<small>();
  check_windows<small_shared>();
  check_windows<small_deterministic>();
  check_windows<small_f32>();
  check_windows<small_f32_deterministic>();
}

TEST(BackwardKernel, Configurations) {
  check_shapes<{.dtype = f16, .head_dim = 64, .block_m = 64, .block_n = 128}>();
  check_shapes<{.dtype = bf16, .head_dim = 32, .head_dim_v = 64, .block_m = 64, .block_n = 64, .stages = 1}>();
  check_shapes<{.dtype = bf16, .head_dim = 64, .block_m = 32, .block_n = 128, .num_warps = 8, .blocks_per_sm = 1}>();
  check_shapes<{.dtype = bf16, .head_dim = 64, .block_m = 64, .block_n = 64, .column_warps = 2}>();
  check_shapes<{.dtype = f16,
                .head_dim = 128,
                .head_dim_v = 64,
                .block_m = 64,
                .block_n = 64,
                .num_warps = 8,
                .column_warps = 4,
                .blocks_per_sm = 1,
                .stages = 1}>();
  check_shapes<{.dtype = bf16,
                .head_dim = 128,
                .block_m = 64,
                .block_n = 64,
                .num_warps = 8,
                .column_warps = 4,
                .blocks_per_sm = 1,
                .deterministic = true}>();
  check_shapes<{.dtype = f16,
                .head_dim = 64,
                .head_dim_v = 32,
                .block_m = 64,
                .block_n = 64,
                .copy_bytes = 2,
                .async_copy = false,
                .swizzled = false,
                .deterministic = true}>();
  check_shapes<{.dtype = f32,
                .head_dim = 128,
                .head_dim_v = 64,
                .block_m = 64,
                .block_n = 64,
                .num_warps = 8,
                .column_warps = 2,
                .blocks_per_sm = 1,
                .math = Math::tf32x3,
                .stages = 1,
                .copy_bytes = 4,
                .mma_double_buffer = false}>();
  check_shapes<{.dtype = f32,
                .head_dim = 128,
                .block_m = 32,
                .block_n = 32,
                .column_warps = 2,
                .blocks_per_sm = 1,
                .math = Math::tf32x3,
                .stages = 1,
                .swizzled = false,
                .deterministic = true}>();
  check_shapes<{.dtype = f32,
                .head_dim = 128,
                .block_m = 32,
                .block_n = 32,
                .column_warps = 2,
                .blocks_per_sm = 1,
                .math = Math::tf32x3}>();
}

// Guards against rows that see no key, keys that no row sees, and lengths of 0: gradients of 0, not memory as it was.
template <BackwardConfig B>
void check_nothing_to_see() {
  for (auto [sq, sk] : {std::pair(40, 20), {0, 20}, {40, 0}, {20, 60}}) {
    BackwardProblem<B, MaskKind::causal> problem(Shape{.sq = sq, .sk = sk, .d = 32});
    check_gradients(problem);
  }
  BackwardProblem<B, MaskKind::causal> early(Shape{.sq = 40, .sk = 40, .d = 32, .causal_offset = -10});
  check_gradients(early);
}

TEST(BackwardKernel, NothingToSee) {
  check_nothing_to_see<small>();
  check_nothing_to_see<small_shared>();
  check_nothing_to_see<small_deterministic>();
  check_nothing_to_see<small_f32>();
  check_nothing_to_see<small_f32_shared>();
  check_nothing_to_see<small_f32_deterministic>();
}

// Guards against NaN and infinity that reach gradients which do not see them, or are lost where they are seen.
// Query i sees keys up to i + 10.
template <BackwardConfig B>
void check_poison() {
  Shape const s{.sq = 40, .sk = 50, .d = 32};
  using Causal = BackwardProblem<B, MaskKind::causal>;
  auto const is_poisoned = [&](Tensor const& t, int row) {
    for (int c = 0; c < s.d; ++c) {
      if (!std::isfinite(t.at(0, row, 0, c))) return true;
    }
    return false;
  };
  for (double value : {nan, inf}) {
    Causal query(s);
    query.problem.q.set(0, 20, 0, 3, value);
    ASSERT_NO_FATAL_FAILURE(query.run(1));
    for (int i = 0; i < s.sq; ++i) EXPECT_EQ(is_poisoned(query.dq, i), i == 20) << i;
    for (int j = 0; j < s.sk; ++j) EXPECT_EQ(is_poisoned(query.dk, j), j <= 30) << j;

    Causal key(s);
    key.problem.k.set(0, 30, 0, 3, value);
    ASSERT_NO_FATAL_FAILURE(key.run(1));
    for (int i = 0; i < s.sq; ++i) EXPECT_EQ(is_poisoned(key.dq, i), i >= 20) << i;
    // Queries that see it have no finite softmax, and between them see all keys.
    for (int j = 0; j < s.sk; ++j) EXPECT_TRUE(is_poisoned(key.dk, j)) << j;

    Causal late(s);
    late.problem.v.set(0, 45, 0, 3, value);
    ASSERT_NO_FATAL_FAILURE(late.run(1));
    for (int i = 0; i < s.sq; ++i) EXPECT_EQ(is_poisoned(late.dq, i), i >= 35) << i;

    Causal gradient(s);
    gradient.dout.set(0, 20, 0, 3, value);
    ASSERT_NO_FATAL_FAILURE(gradient.run(1));
    for (int i = 0; i < s.sq; ++i) EXPECT_EQ(is_poisoned(gradient.dq, i), i == 20) << i;
    for (int j = 0; j < s.sk; ++j) {
      EXPECT_EQ(is_poisoned(gradient.dk, j), j <= 30) << j;
      EXPECT_EQ(is_poisoned(gradient.dv, j), j <= 30) << j;
    }
  }
}

// Beside a window: query i sees keys i + 5 to i + 25.
template <BackwardConfig B>
void check_poison_beside_a_window() {
  Shape const s{.sq = 80, .sk = 110, .d = 32, .causal_offset = 25, .window_offset = 5};
  auto const is_poisoned = [&](Tensor const& t, int row) { return !std::isfinite(t.at(0, row, 0, 3)); };
  for (double value : {nan, inf}) {
    BackwardProblem<B, MaskKind::band> late(s);
    late.problem.v.set(0, 45, 0, 3, value);
    ASSERT_NO_FATAL_FAILURE(late.run(1));
    for (int i = 0; i < s.sq; ++i) EXPECT_EQ(is_poisoned(late.dq, i), i >= 20 && i <= 40) << i;

    BackwardProblem<B, MaskKind::band> gradient(s);
    gradient.dout.set(0, 20, 0, 3, value);
    ASSERT_NO_FATAL_FAILURE(gradient.run(1));
    for (int i = 0; i < s.sq; ++i) EXPECT_EQ(is_poisoned(gradient.dq, i), i == 20) << i;
    for (int j = 0; j < s.sk; ++j) {
      EXPECT_EQ(is_poisoned(gradient.dk, j), j >= 25 && j <= 45) << j;
      EXPECT_EQ(is_poisoned(gradient.dv, j), j >= 25 && j <= 45) << j;
    }
  }
}

// The same in a block that is partial only because it has rows that do not exist.
template <BackwardConfig B>
void check_poison_at_the_end() {
  Shape const s{.sq = B.block_m + 8, .sk = 20, .d = 32, .causal_offset = 100};
  BackwardProblem<B, MaskKind::causal> problem(s);
  problem.dout.set(0, B.block_m + 3, 0, 3, inf);
  ASSERT_NO_FATAL_FAILURE(problem.run(1));
  for (int j = 0; j < s.sk; ++j) EXPECT_EQ(problem.dv.at(0, j, 0, 3), inf) << j;
}

TEST(BackwardKernel, PoisonReachesWhatSeesIt) {
  check_poison_at_the_end<small>();
  check_poison_at_the_end<small_deterministic>();
  check_poison_at_the_end<small_f32>();
  check_poison_at_the_end<small_f32_deterministic>();
  check_poison<small>();
  check_poison<small_shared>();
  check_poison<small_deterministic>();
  check_poison<small_f32>();
  check_poison<small_f32_shared>();
  check_poison<small_f32_deterministic>();
  check_poison_beside_a_window<small>();
  check_poison_beside_a_window<small_shared>();
  check_poison_beside_a_window<small_deterministic>();
  check_poison_beside_a_window<small_f32>();
  check_poison_beside_a_window<small_f32_deterministic>();
}

// Guards against NaN from the rows of zeros that stand where there is no query: a score of them with a key that is
// -inf, whose weight is 0 everywhere.
template <BackwardConfig B, MaskKind Kind>
void check_padding() {
  BackwardProblem<B, Kind> problem(Shape{.sq = 40, .sk = 20, .d = 32, .causal_offset = 20});
  for (int i = 0; i < 40; ++i) problem.problem.q.set(0, i, 0, 0, 1);
  problem.problem.k.set(0, 7, 0, 0, -inf);
  ASSERT_NO_FATAL_FAILURE(problem.run(1));
  for (int c = 0; c < 32; ++c) {
    EXPECT_EQ(problem.dv.at(0, 7, 0, c), 0) << c;
    if (c > 0) {
      EXPECT_EQ(problem.dk.at(0, 7, 0, c), 0) << c;
    }
  }
}

TEST(BackwardKernel, NoQueryIsNotAQueryOfZeros) {
  check_padding<small, MaskKind::full>();
  check_padding<small, MaskKind::causal>();
  check_padding<small_deterministic, MaskKind::full>();
  check_padding<small_deterministic, MaskKind::causal>();
  check_padding<small_f32, MaskKind::full>();
  check_padding<small_f32, MaskKind::causal>();
  check_padding<small_f32_deterministic, MaskKind::causal>();
}

}  // namespace
}  // namespace flashcute
