// The forward kernel itself, run on the host by emulated thread blocks: all its configurations.
#include "flashcute/core/defaults.hpp"
#include "kernel/kernel_configuration.hpp"

namespace flashcute {
namespace {

// Guards against configurations that only work by luck: every option is used, alone and together.
TEST(ForwardKernel, DefaultConfigurations) {
  check_configuration<causal(default_forward_config(bf16, 64, 80))>();
  check_configuration<full(default_forward_config(f16, 64, 80))>();
  check_configuration<full(default_forward_config(bf16, 128, 80))>();
  check_configuration<causal(default_forward_config(f16, 128, 80))>();
  check_configuration<causal(default_forward_config(bf16, 256, 80))>();
}

TEST(ForwardKernel, DefaultConfigurationsOfFloat32) {
  check_configuration<causal(default_forward_config(f32, 64, 80))>();
  check_configuration<full(default_forward_config(f32, 128, 80))>();
  check_configuration<causal(default_forward_config(f32, 256, 80))>();
}

TEST(ForwardKernel, TensorFloat32) {
  check_configuration<causal({.dtype = f32, .head_dim = 64, .block_m = 64, .block_n = 32})>();
  check_configuration<full({.dtype = f32, .head_dim = 32, .block_m = 64, .block_n = 16, .q_in_registers = true})>();
}

// Guards against fp32 that is TF32 in truth, in the loop or in what is left of the numbers.
TEST(ForwardKernel, ThreeProductsOfTensorFloat32) {
  check_configuration<causal({.dtype = f32, .head_dim = 64, .block_m = 64, .block_n = 32, .math = Math::tf32x3})>();
  check_configuration<full({.dtype = f32, .head_dim = 32, .head_dim_v = 48, .block_n = 32, .math = Math::tf32x3})>();
  check_configuration<full({.dtype = f32,
                            .head_dim = 16,
                            .block_m = 32,
                            .block_n = 32,
                            .num_warps = 2,
                            .math = Math::tf32x3,
                            .stages = 2,
                            .copy_bytes = 4})>();
}

/// Scores of -inf, scores of both infinities, infinite and NaN values.
template <ForwardKernelId Id>
void check_infinity() {
  Problem keys(Id, {.sq = 40, .sk = 50, .d = 32});
  for (int i = 0; i < 40; ++i) keys.q.set(0, i, 0, 0, 1);
  for (int j = 7; j < 30; ++j) keys.k.set(0, j, 0, 0, -inf);
  check<Id>(keys);
  Problem queries(Id, {.sq = 40, .sk = 50, .d = 32});
  for (int j = 0; j < 50; ++j) queries.k.set(0, j, 0, 0, j % 3 == 0 ? 1 : -1);
  queries.q.set(0, 5, 0, 0, inf);
  check<Id>(queries);
  Problem values(Id, {.sq = 40, .sk = 50, .d = 32});
  values.v.set(0, 20, 0, 3, inf);
  values.v.set(0, 40, 0, 3, inf);
  values.v.set(0, 21, 0, 4, -inf);
  values.v.set(0, 21, 0, 5, nan);
  check<Id>(values);
}

// Guards against infinity - infinity where numbers are taken apart, in blocks that all rows see and others, and in K
// and V that arrive apart or together.
TEST(ForwardKernel, ThreeProductsOfInfinity) {
  constexpr ForwardConfig one = {.dtype = f32, .head_dim = 32, .block_m = 64, .block_n = 16, .math = Math::tf32x3};
  constexpr ForwardConfig two = {
      .dtype = f32, .head_dim = 32, .block_m = 32, .block_n = 16, .num_warps = 2, .math = Math::tf32x3, .stages = 2};
  check_infinity<full(one)>();
  check_infinity<causal(one)>();
  check_infinity<full(two)>();
  check_infinity<causal(two)>();
}

/// Every multiple of 8 that the kernel's bucket serves.
template <ForwardKernelId Id>
void check_head_dims(int narrowest) {
  for (int d = narrowest; d <= Id.config.head_dim; d += 8) {
    check<Id>({.sq = 20, .sk = Id.config.block_n + 3, .d = d, .d_v = narrowest + Id.config.head_dim - d});
  }
}

// Head dims that are no multiple of 16, or that no kernel computes.
TEST(ForwardKernel, EveryHeadDim) {
  check_head_dims<causal(default_forward_config(bf16, 64, 80))>(8);
  check_head_dims<full(default_forward_config(f16, 128, 80))>(72);
  check_head_dims<full(default_forward_config(bf16, 256, 80))>(136);
  check_head_dims<causal(default_forward_config(f32, 64, 80))>(8);
  check_head_dims<full(default_forward_config(f32, 128, 80))>(72);
  check_head_dims<causal(default_forward_config(f32, 256, 80))>(136);
}

template <ForwardKernelId Id>
std::vector<uint8_t> bits(Shape const& s) {
  Problem problem(Id, s);
  check<Id>(problem);
  return problem.out.bytes();
}

// The tile for small grids may be chosen by the batch, because block_m changes no bit.
TEST(ForwardKernel, RowsDoNotDependOnTheirTile) {
  constexpr ForwardConfig large = default_forward_config(bf16, 64, 80), small = small_grid_forward_config(bf16, 64, 80);
  static_assert(large != small);
  for (Shape const& s : {Shape{.sq = 200, .sk = 170, .d = 64}, Shape{.sq = 100, .sk = 300, .d = 40}}) {
    EXPECT_EQ(bits<causal(large)>(s), bits<causal(small)>(s));
    EXPECT_EQ(bits<full(large)>(s), bits<full(small)>(s));
  }
  constexpr ForwardConfig large_128 = default_forward_config(f16, 128, 80),
                          small_128 = small_grid_forward_config(f16, 128, 80);
  EXPECT_EQ(bits<causal(large_128)>({.sq = 100, .sk = 150, .d = 128}),
            bits<causal(small_128)>({.sq = 100, .sk = 150, .d = 128}));
}

// Guards against operands whose lower bits are cut off, not rounded: with one key the output is V, rounded.
TEST(ForwardKernel, TensorFloat32Rounds) {
  constexpr ForwardKernelId id = full({.dtype = f32, .head_dim = 32, .block_m = 64, .block_n = 32});
  Problem problem(id, {.sq = 5, .sk = 1, .d = 32});
  check<id>(problem);
  int raised = 0;
  for (int c = 0; c < 32; ++c) {
    auto const v = static_cast<float>(problem.v.at(0, 0, 0, c)), out = static_cast<float>(problem.out.at(0, 4, 0, c));
    auto const bits = std::bit_cast<uint32_t>(v);
    EXPECT_EQ(std::bit_cast<uint32_t>(out), (bits + 0x1000u) & 0xffffe000u) << v;
    raised += (bits & 0x1000u) != 0;
  }
  EXPECT_GT(raised, 4);
}

// Guards against a finite value that rounding makes infinite: rows that do not see it would multiply it by 0.
TEST(ForwardKernel, TensorFloat32DoesNotRoundToInfinity) {
  // With a threshold a weight is above 1 until the end: docs/decisions/0005-special-values.md.
  constexpr ForwardKernelId id =
      causal({.dtype = f32, .head_dim = 16, .block_m = 64, .block_n = 32, .rescale_threshold = 0});
  Problem problem(id, {.sq = 40, .sk = 40, .d = 16});
  problem.v.set(0, 30, 0, 3, std::numeric_limits<float>::max());
  ASSERT_NO_FATAL_FAILURE(run<id>(problem, 1));
  for (int row = 0; row < 40; ++row) EXPECT_TRUE(std::isfinite(problem.out.at(0, row, 0, 3))) << row;
}

// Guards against a row that hides an infinity it sees with next to no weight, in whichever tile it is.
TEST(ForwardKernel, InfinityOfLittleWeightIsNotHidden) {
  constexpr ForwardConfig large = default_forward_config(f16, 64, 80), small = small_grid_forward_config(f16, 64, 80);
  auto const check_row = [&]<ForwardKernelId Id>() {
    Problem problem(Id, {.sq = 200, .sk = 200, .d = 64});
    problem.q.set_row(0, 100, 0, 0);
    problem.k.set_row(0, 10, 0, 0);
    problem.q.set(0, 100, 0, 0, 8);
    problem.k.set(0, 10, 0, 0, -40);  // a score of -40, where others are below 10 in size
    problem.v.set(0, 10, 0, 0, inf);
    ASSERT_NO_FATAL_FAILURE(run<Id>(problem, 1));
    EXPECT_FALSE(std::isfinite(problem.out.at(0, 100, 0, 0)));
    EXPECT_TRUE(std::isfinite(problem.out.at(0, 9, 0, 0)));
    EXPECT_TRUE(std::isfinite(problem.out.at(0, 100, 0, 1)));
  };
  check_row.operator()<causal(large)>();
  check_row.operator()<causal(small)>();
}

// Guards against layouts that only work where tiles are of a common size.
TEST(ForwardKernel, ExtremeConfigurations) {
  check_configuration<causal({.dtype = f32,
                              .head_dim = 48,
                              .head_dim_v = 16,
                              .block_m = 16,
                              .block_n = 16,
                              .num_warps = 1,
                              .copy_bytes = 4,
                              .k_tiles_per_load = 1})>();
  check_configuration<full({.head_dim = 112, .head_dim_v = 240, .block_m = 64, .block_n = 128})>();
  check_configuration<causal({.dtype = f16, .head_dim = 64, .block_m = 128, .block_n = 224, .num_warps = 8})>();
}

// Guards against widths whose rows are cut into chunks of 128, 64 and 32 bytes, and into different ones.
TEST(ForwardKernel, HeadDimsOfValues) {
  check_configuration<causal({.head_dim = 48, .head_dim_v = 96, .block_m = 64, .num_warps = 2})>();
  check_configuration<full({.head_dim = 192, .head_dim_v = 16, .block_m = 64})>();
  check_configuration<causal(
      {.dtype = f32, .head_dim = 16, .head_dim_v = 48, .block_m = 64, .math = Math::cuda_core})>();
}

TEST(ForwardKernel, CudaCoresMultiply16BitTypes) {
  check_configuration<causal({.dtype = bf16, .head_dim = 64, .block_m = 64, .math = Math::cuda_core})>();
  check_configuration<full(
      {.dtype = f16, .head_dim = 32, .block_m = 32, .num_warps = 2, .math = Math::cuda_core, .swizzled = false})>();
}

// Guards against rows that start at any address.
TEST(ForwardKernel, CopiesOfFewBytes) {
  check_configuration<causal({.head_dim = 64, .block_m = 64, .copy_bytes = 8})>();
  check_configuration<full({.dtype = f16, .head_dim = 64, .block_m = 64, .copy_bytes = 4})>();
  check_configuration<causal({.head_dim = 64, .block_m = 64, .copy_bytes = 2, .async_copy = false})>();
  check_configuration<full({.dtype = f32, .head_dim = 32, .block_m = 64, .math = Math::cuda_core, .copy_bytes = 4})>();
}

}  // namespace
}  // namespace flashcute
