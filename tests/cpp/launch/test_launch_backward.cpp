// The backward's host side on a GPU: workspaces, passes and their grids, and which calls never reach the driver. With
// the fakes of test_launch.cpp.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "fakes/fake_gpu.hpp"
#include "flashcute/api.hpp"
#include "flashcute/core/defaults.hpp"
#include "image/jit.hpp"
#include "image/source.hpp"
#include "support/printing.hpp"

namespace flashcute {
namespace {

using namespace testing;

/// A call of `backward` whose tensors lie in places of their own.
struct BackwardCall {
  std::array<int64_t, 4> q_shape, k_shape;  // of v: k's
  DType dtype;
  Device device;
  CallOptions options;
  TensorView q = place(1, q_shape), k = place(2, k_shape), v = place(3, k_shape), out = place(4, q_shape),
             dout = place(5, q_shape), dq = place(6, q_shape), dk = place(7, k_shape), dv = place(8, k_shape),
             lse = rows(9), dlse = rows(10), workspace = place(11, {1, 1, 1, 1 << 30}, DType::float32);
  bool with_workspace = true;

  BackwardCall(std::array<int64_t, 4> shape_of_q, std::array<int64_t, 4> shape_of_k, DType type = DType::bfloat16,
               int gpu = 0)
      : q_shape(shape_of_q), k_shape(shape_of_k), dtype(type), device{DeviceType::cuda, gpu} {}

  TensorView place(std::uintptr_t where, std::array<int64_t, 4> shape, std::optional<DType> of = {}) const {
    return dense_view(reinterpret_cast<void*>(where << 40), of.value_or(dtype), device, shape);
  }

  TensorView rows(std::uintptr_t where) const {
    TensorView t = place(where, {q_shape[0], q_shape[2], q_shape[1], 1}, DType::float32);
    t.rank = 3;
    return t;
  }

  void run(std::optional<BackwardConfig> const& config = {}) {
    backward(config, dout, q, k, v, out, lse, &dlse, dq, dk, dv, options, with_workspace ? &workspace : nullptr);
  }

  template <class Exception>
  void refused(std::initializer_list<char const*> words, std::optional<BackwardConfig> const& config = {}) {
    try {
      run(config);
      FAIL() << "no exception for " << *words.begin();
    } catch (Exception const& e) {
      for (char const* word : words) EXPECT_NE(std::string(e.what()).find(word), std::string::npos) << e.what();
    }
  }
};

/// Its deterministic kernels have no image.
class LaunchBackward : public FakeGpuAndCompiler {
 protected:
  std::vector<std::string> launched() const {
    std::vector<std::string> names;
    for (FakeLaunch const& launch : driver_->launches) names.push_back(launch.kernel);
    return names;
  }

  /// The names of a configuration's kernels for these passes.
  static std::vector<std::string> names(BackwardConfig const& config, std::vector<BackwardPass> const& passes,
                                        MaskKind mask = MaskKind::full) {
    std::vector<std::string> all;
    for (BackwardPass const pass : passes) all.emplace_back(name(kernel_of(config, pass, {mask})).text);
    return all;
  }
};

// Guards against passes in the wrong order, a grid of the other side's tiles, too little shared memory, and a workspace
// that two parts share.
TEST_F(LaunchBackward, AddsInThreePasses) {
  BackwardCall call({3, 1000, 4, 64}, {3, 700, 2, 64}, DType::bfloat16, 1);
  call.options.causal = true;
  call.options.stream = reinterpret_cast<void*>(std::uintptr_t{0x77});
  call.run();
  call.run();
  BackwardConfig const config = default_backward_config(DType::bfloat16, 64, 100);
  using enum BackwardPass;
  auto const once = names(config, {prepare, gradients, finish}, MaskKind::causal);
  EXPECT_EQ(driver_->loads, 3);
  ASSERT_EQ(driver_->launches.size(), 6u);
  for (std::size_t i = 0; i < 6; ++i) {
    FakeLaunch const& launch = driver_->launches[i];
    BackwardKernelId const kernel = kernel_of(config, passes_of(config).pass[i % 3], {MaskKind::causal});
    EXPECT_EQ(launch.kernel, once[i % 3]);
    unsigned const tiles = keys_stay(kernel.pass) ? 3u * 2 * ((700 + config.block_n - 1) / config.block_n)
                                                  : 3u * 4 * ((1000 + config.block_m - 1) / config.block_m);
    EXPECT_EQ(launch.grid_x, tiles) << launch.kernel;
    EXPECT_EQ(launch.grid_y * launch.grid_z, 1u);
    EXPECT_EQ(launch.block_x, 32u * config.num_warps);
    EXPECT_EQ(launch.shared_bytes, static_cast<unsigned>(smem_bytes(kernel)));
    EXPECT_EQ(launch.stream, call.options.stream);
    EXPECT_EQ(launch.context, reinterpret_cast<void*>(std::uintptr_t{0x1001})) << "the primary context of device 1";
    ASSERT_TRUE(launch.backward);
    BackwardParams const& p = *launch.backward;
    EXPECT_EQ(p.delta, call.workspace.data);
    EXPECT_EQ(p.dq_sums, static_cast<float*>(call.workspace.data) + 3 * 4 * 1000);
    EXPECT_EQ(p.dv, call.dv.data);
    EXPECT_EQ(p.dlse, call.dlse.data);
    EXPECT_EQ(p.dq_stride.row, 4 * 64);
    EXPECT_EQ(p.forward.lse, call.lse.data);
    EXPECT_EQ(p.forward.causal_offset, -300);
    EXPECT_GT(p.forward.scale_log2, 0.f);
  }
  EXPECT_EQ(driver_->pushes, driver_->pops);
  EXPECT_EQ(backward_workspace_size({}, call.q, call.v), workspace_of(config, 12, 1000).total());
}

// Guards against Hopper's gradients launched without their maps, by a thread that has no context (autograd's), with the
// grid or the workspace of other kernels.
TEST_F(LaunchBackward, HoppersGradients) {
  BackwardCall call({3, 1000, 4, 120}, {3, 700, 2, 120}, DType::bfloat16, 2);
  call.run();
  BackwardConfig const config = default_backward_config(DType::bfloat16, 120, 90);
  ASSERT_EQ(config.kernel, Kernel::sm90);
  using enum BackwardPass;
  EXPECT_EQ(launched(), names(config, {prepare, gradients, finish}));
  ASSERT_EQ(driver_->tensor_maps.size(), 4u);
  std::vector<void*> const copied{call.q.data, call.k.data, call.v.data, call.dout.data};
  for (std::size_t i = 0; i < 4; ++i) {
    bool const keys = i == 1 || i == 2;
    FakeTensorMap const& map = driver_->tensor_maps[i];
    EXPECT_EQ(map.address, copied[i]);
    EXPECT_EQ(map.sizes, (std::vector<std::uint64_t>{120, keys ? 700u : 1000u, keys ? 2u : 4u, 3}));
    EXPECT_EQ(map.box, (std::vector<unsigned>{64, keys ? 128u : 64u, 1, 1}));
  }
  std::vector<unsigned> grids, threads;
  for (FakeLaunch const& launch : driver_->launches) {
    grids.push_back(launch.grid_x);
    threads.push_back(launch.block_x);
    EXPECT_EQ(launch.backward->delta, call.workspace.data);
    EXPECT_EQ(launch.backward->dq_sums, static_cast<float*>(call.workspace.data) + 2 * 12 * 1024);
  }
  EXPECT_EQ(grids, (std::vector<unsigned>{12 * 16, 6 * 6, 12 * 16}));
  EXPECT_EQ(threads, (std::vector<unsigned>{256, 384, 256}));
  EXPECT_EQ(driver_->pushes, driver_->pops);
  EXPECT_GE(backward_workspace_size({}, call.q, call.v), workspace_of(config, 12, 1000).total());
}

// Guards against tiles of keys that no thread block computes: persistent ones take them from a counter, which nothing
// clears where there are no queries.
TEST_F(LaunchBackward, HoppersGradientsTakeManyTiles) {
  auto const grid = [&](BackwardCall call, BackwardConfig const& config) {
    driver_->launches.clear();
    call.run(config);
    for (FakeLaunch const& launch : driver_->launches) {
      if (launch.block_x == 384) return launch.grid_x;
    }
    return 0u;
  };
  BackwardConfig config = default_backward_config(DType::bfloat16, 64, 90);
  ASSERT_TRUE(config.persistent);
  unsigned const tiles = 2 * 4 * 40;
  BackwardCall const call({2, 500, 4, 64}, {2, 40 * 128, 4, 64}, DType::bfloat16, 2);
  EXPECT_EQ(grid(call, config), 132u);
  BackwardCall const no_queries({2, 0, 4, 64}, {2, 40 * 128, 4, 64}, DType::bfloat16, 2);
  EXPECT_EQ(grid(no_queries, config), tiles);
  config.persistent = false;
  EXPECT_EQ(grid(call, config), tiles);
}

// Guards against maps of wide heads that copy other boxes than tiles have, and against sums that nobody needs.
TEST_F(LaunchBackward, HoppersGradientsOfWideHeads) {
  BackwardCall call({3, 1000, 4, 200}, {3, 700, 2, 200}, DType::bfloat16, 2);
  call.run();
  BackwardConfig const config = default_backward_config(DType::bfloat16, 200, 90);
  ASSERT_EQ(config.kernel, Kernel::sm90);
  EXPECT_TRUE(config.deterministic);
  using enum BackwardPass;
  EXPECT_EQ(launched(), names(config, {queries, keys}));
  ASSERT_EQ(driver_->tensor_maps.size(), 4u);
  for (FakeTensorMap const& map : driver_->tensor_maps) EXPECT_EQ(map.box, (std::vector<unsigned>{64, 64, 1, 1}));
  std::vector<unsigned> grids, threads;
  for (FakeLaunch const& launch : driver_->launches) {
    grids.push_back(launch.grid_x);
    threads.push_back(launch.block_x);
    EXPECT_EQ(launch.backward->delta, call.workspace.data);
    EXPECT_EQ(launch.backward->dq_sums, nullptr);
  }
  EXPECT_EQ(grids, (std::vector<unsigned>{12 * 8, 6 * 11}));
  EXPECT_EQ(threads, (std::vector<unsigned>{384, 384}));
}

// Guards against the slower kernels under a window, and against those of another mask.
TEST_F(LaunchBackward, HoppersGradientsOfAWindow) {
  BackwardCall call({1, 256, 2, 64}, {1, 256, 2, 64}, DType::bfloat16, 2);
  call.options.window_left = call.options.window_right = 8;
  call.run();
  BackwardConfig const config = default_backward_config(DType::bfloat16, 64, 90);
  ASSERT_EQ(config.kernel, Kernel::sm90);
  using enum BackwardPass;
  EXPECT_EQ(launched(), names(config, {prepare, gradients, finish}, MaskKind::band));
  EXPECT_EQ(driver_->tensor_maps.size(), 4u);
}

// Guards against kernels that know no window, taken because they are the default without one.
TEST_F(LaunchBackward, WhereHoppersGradientsServeNoWindowTheOthersRun) {
  for (auto const& [head_dim, deterministic] : {std::pair{64, true}, {256, false}, {256, true}}) {
    BackwardCall call({1, 256, 2, head_dim}, {1, 256, 2, head_dim}, DType::bfloat16, 2);
    call.options.window_left = call.options.window_right = 8;
    call.options.deterministic = deterministic;
    BackwardConfig const hoppers = default_backward_config(DType::bfloat16, head_dim, 90, {}, deterministic);
    ASSERT_EQ(hoppers.kernel, Kernel::sm90);
    EXPECT_THROW(call.run(hoppers), ConfigError) << name(hoppers).text;
    EXPECT_TRUE(driver_->launches.empty());
    call.run();
    BackwardConfig const config = default_backward_config(DType::bfloat16, head_dim, 100, {}, deterministic);
    ASSERT_EQ(config.kernel, Kernel::sm80);
    BackwardPasses const passes = passes_of(config);
    EXPECT_EQ(launched(), names(config, {passes.begin(), passes.end()}, MaskKind::band));
    driver_->launches.clear();
  }
  EXPECT_TRUE(driver_->tensor_maps.empty());
}

TEST_F(LaunchBackward, IsDeterministicInTwoPasses) {
  BackwardCall call({2, 300, 2, 128}, {2, 300, 2, 128});
  call.options.deterministic = true;
  call.run();
  BackwardConfig const config = default_backward_config(DType::bfloat16, 128, 100, 128, true);
  EXPECT_EQ(launched(), names(config, {BackwardPass::queries, BackwardPass::keys}));
  for (FakeLaunch const& launch : driver_->launches) {
    EXPECT_EQ(launch.backward->delta, call.workspace.data);
    EXPECT_EQ(launch.backward->dq_sums, nullptr);
  }
  EXPECT_EQ(backward_workspace_size(config, call.q, call.v), 2 * 300 * 2);
}

// Guards against gradients that nobody writes where one side is empty.
TEST_F(LaunchBackward, EmptySidesSkipOnlyTheirPasses) {
  using enum BackwardPass;
  BackwardConfig const adding = default_backward_config(DType::bfloat16, 64, 100);
  BackwardConfig const deterministic = default_backward_config(DType::bfloat16, 64, 100, 64, true);
  auto const run = [&](BackwardCall call, BackwardConfig const& config) {
    driver_->launches.clear();
    call.run(config);
    return launched();
  };
  BackwardCall const no_keys({1, 64, 2, 64}, {1, 0, 2, 64});
  EXPECT_EQ(run(no_keys, adding), names(adding, {prepare, finish}));
  EXPECT_EQ(run(no_keys, deterministic), names(deterministic, {queries}));
  BackwardCall no_queries({1, 0, 2, 64}, {1, 64, 2, 64});
  no_queries.with_workspace = false;
  EXPECT_EQ(backward_workspace_size(adding, no_queries.q, no_queries.v), 0);
  EXPECT_EQ(run(no_queries, adding), names(adding, {gradients}));
  EXPECT_EQ(run(no_queries, deterministic), names(deterministic, {keys}));
  EXPECT_TRUE(run({{0, 64, 2, 64}, {0, 64, 2, 64}}, adding).empty());
}

// Guards against half of a backward: sums that no pass clears or finishes.
TEST_F(LaunchBackward, NothingIsLaunchedUnlessAllKernelsAreReady) {
  BackwardCall call({1, 64, 1, 64}, {1, 64, 1, 64});
  driver_->loads_that_succeed = 2;
  call.refused<DriverError>({"cuLibraryLoadData", "_finish", "CUDA_ERROR_FAKE"});
  EXPECT_TRUE(driver_->launches.empty());
  driver_->loads_that_succeed = 3;  // of which two are ready
  EXPECT_THROW(call.run(), DriverError);
  driver_->loads_that_succeed = 100;
  call.run();
  EXPECT_EQ(driver_->launches.size(), 3u);
}

// Guards against a training step that waits for two compilations, the forward's and then the backward's: with a
// compiler that takes no time, what is seen is which kernels are in the disk cache.
TEST_F(LaunchBackward, ItsKernelsAreCompiledWithTheForwards) {
  ScopedVariable const force("FLASHCUTE_JIT", "force");
  std::array<int64_t, 4> const shape{1, 64, 2, 64};
  BackwardCall call(shape, shape);
  call.options.causal = true;
  auto const are_cached = [](bool deterministic) {
    BackwardConfig const config = default_backward_config(DType::bfloat16, 64, 100, 64, deterministic);
    std::vector<bool> all;
    for (BackwardPass const pass : passes_of(config)) {
      all.push_back(is_cached(code_of(kernel_of(config, pass, {MaskKind::causal}), 100), 100));
    }
    return all;
  };
  CallOptions options;
  options.causal = true;
  TensorView const t = tensor(shape);
  auto const forward_with = [&](bool gradients) {
    options.gradients_follow = gradients;
    forward({}, t, t, t, output(shape), nullptr, options);
  };
  forward_with(false);
  EXPECT_EQ(are_cached(false), std::vector<bool>(3, false));
  forward_with(true);
  EXPECT_EQ(are_cached(false), std::vector<bool>(3, false)) << "a call that compiles nothing does not begin to";
  options.causal = false;
  forward_with(true);
  options.causal = true;
  EXPECT_EQ(are_cached(false), (std::vector<bool>{true, false, true})) << "all but the other mask's";
  EXPECT_EQ(driver_->launches.size(), 3u);
}

// Guards against kernels that are compiled along and never run: those for tensors that are aligned as these are not.
TEST_F(LaunchBackward, TheKernelsThatAreCompiledWithTheForwardsAreThoseThatRun) {
  ScopedVariable const force("FLASHCUTE_JIT", "force");
  BackwardCall call({1, 64, 2, 60}, {1, 64, 2, 60});
  call.options.gradients_follow = true;
  forward({}, call.q, call.k, call.v, call.out, nullptr, call.options);
  BackwardConfig const config = backward_config_for(call.q, call.k, call.v);
  EXPECT_EQ(config.copy_bytes, 8);
  for (BackwardPass const pass : passes_of(config)) {
    KernelCode const code = code_of(kernel_of(config, pass, {}), 100);
    EXPECT_TRUE(is_cached(code, 100)) << code.name;
  }
}

TEST_F(LaunchBackward, AFailedLaunchRaisesAndNamesTheKernel) {
  driver_->launch_result = 1;
  BackwardCall call({1, 64, 1, 64}, {1, 64, 1, 64});
  call.refused<DriverError>({"cuLaunchKernelEx", "bwd_bf16_d64", "_prepare", "grid 1", "CUDA_ERROR_FAKE"});
  EXPECT_EQ(driver_->launches.size(), 1u);
}

class PlanBackwardOnGpu : public FakeGpu {
 protected:
  void TearDown() override {
    EXPECT_TRUE(driver_->launches.empty());
    EXPECT_EQ(driver_->loads, 0);
  }

  BackwardCall call_{{2, 64, 2, 64}, {2, 96, 1, 64}};
};

TEST_F(PlanBackwardOnGpu, ATooLargeGridIsRefused) {
  BackwardCall queries({1 << 17, 1, 1 << 14, 8}, {1 << 17, 0, 1 << 14, 8});
  queries.options.deterministic = true;
  queries.workspace.shape[3] = int64_t{1} << 32;
  queries.refused<UnsupportedError>({"q: batch * heads * ceil(seqlen_q / block_m)", "Split the batch"});
  BackwardCall keys({1 << 17, 0, 1 << 14, 8}, {1 << 17, 1, 1 << 14, 8});
  keys.refused<UnsupportedError>({"k: batch * kv_heads * ceil(seqlen_k / block_n)", "Split the batch"});
}

// Guards against a workspace whose size wrapped: 2^71 elements are 0 of 64 bits.
TEST_F(PlanBackwardOnGpu, AWorkspaceWithoutASizeIsRefused) {
  BackwardCall const huge({1 << 30, 1, 1 << 29, 1}, {1 << 30, 1, 1 << 29, 1});
  EXPECT_THROW(backward_workspace_size({}, huge.q, huge.v), UnsupportedError);
  BackwardCall none({1 << 30, 0, 1 << 30, 8}, {1 << 30, 1, 1, 8});
  EXPECT_EQ(backward_workspace_size({}, none.q, none.v), 0);
  BackwardCall call = call_;
  call.workspace.shape = {1 << 30, 1 << 30, 1 << 4, 8};
  call.workspace.strides = {0, 128, 8, 1};
  call.refused<ArgumentError>({"workspace: expected a contiguous float32 tensor", "strides that leave gaps"});
}

// Guards against a workspace that is too small for the configuration that runs: the size is asked for with q and v
// alone, and the configuration depends on the alignment of all tensors. On Hopper that decides which kernels run, and
// the size is that of those which need more.
TEST_F(PlanBackwardOnGpu, TheWorkspaceIsThatOfTheConfigurationThatRuns) {
  for (int64_t const head_dim : {8, 60, 64, 100, 128, 130, 192, 256}) {
    for (DType const dtype : {DType::bfloat16, DType::float32}) {
      for (bool const deterministic : {false, true}) {
        for (int const device : {0, hopper}) {
          for (int const shift : {0, 8, 4}) {
            BackwardCall call({2, 100, 2, head_dim}, {2, 70, 1, head_dim}, dtype, device);
            call.options.deterministic = deterministic;
            call.dk.data = static_cast<char*>(call.dk.data) + shift;
            auto const config = backward_config_for(call.q, call.k, call.v, {{"dk", &call.dk}}, call.options);
            int64_t const size = backward_workspace_size({}, call.q, call.v, call.options);
            int64_t const used = workspace_of(config, 4, 100).total();
            bool const two_choices = device == hopper && dtype == DType::bfloat16;
            EXPECT_TRUE(size == used || (two_choices && size > used)) << name(config).text << ": " << size;
          }
        }
      }
    }
  }
}

// The same of packed sequences, whose sums lie in other places; and against the memory of kernels that cannot run.
TEST_F(PlanBackwardOnGpu, TheWorkspaceOfPackedSequencesIsThatOfKernelsThatServeThem) {
  for (int64_t const head_dim : {64, 128, 192, 256}) {
    for (bool const deterministic : {false, true}) {
      BackwardCall call({1, 1000, 4, head_dim}, {1, 1000, 2, head_dim}, DType::bfloat16, hopper);
      TensorView starts = call.place(12, {1, 1, 1, 3}, DType::float32);
      starts.dtype = ElementType::int32;
      starts.rank = 1;
      starts.shape = {3};
      starts.strides = {1};
      for (TensorView* t : {&call.q, &call.k, &call.v}) {
        std::shift_left(t->shape.begin(), t->shape.end(), 1);
        std::shift_left(t->strides.begin(), t->strides.end(), 1);
        t->rank = 3;
      }
      call.options.cu_seqlens_q = &starts;
      call.options.deterministic = deterministic;
      BackwardConfig const config = backward_config_for(call.q, call.k, call.v, {}, call.options);
      EXPECT_EQ(config.kernel, head_dim <= 128 && !deterministic ? Kernel::sm90 : Kernel::sm80);
      EXPECT_EQ(backward_workspace_size({}, call.q, call.v, call.options),
                workspace_of(config, 4, 1000, Packing::slots(1000, 2, config.block_m)).total())
          << name(config).text;
    }
  }
}

// Guards against sums that are written past the end of a workspace, or over what is still to be read.
TEST_F(PlanBackwardOnGpu, WorkspacesAreChecked) {
  std::string const needed = std::to_string(backward_workspace_size({}, call_.q, call_.v));
  EXPECT_EQ(needed, std::to_string(2 * 2 * 64 + 2 * 2 * 64 * 64));
  auto const refuse = [&](auto change, std::initializer_list<char const*> words) {
    BackwardCall call = call_;
    change(call);
    call.refused<ArgumentError>(words);
  };
  refuse([](auto& c) { c.with_workspace = false; },
         {"workspace: expected a contiguous float32 tensor of", needed.c_str(), "backward_workspace_size", "got none"});
  refuse([](auto& c) { c.workspace.dtype = ElementType::bfloat16; }, {"workspace", "float32", "bfloat16"});
  refuse([](auto& c) { c.workspace.device.index = 1; }, {"workspace", "cuda:0", "cuda:1"});
  refuse([](auto& c) { c.workspace.shape[3] = 16639; }, {"workspace", needed.c_str(), "(1, 1, 1, 16639)"});
  refuse([](auto& c) { c.workspace.strides[3] = 2; }, {"workspace", "contiguous", "gaps"});
  refuse([](auto& c) { c.workspace.read_only = true; }, {"workspace", "writable"});
  refuse([](auto& c) { c.workspace.data = static_cast<char*>(c.workspace.data) + 4; },
         {"workspace", "multiple of 16 bytes", "4 bytes past"});
  refuse([](auto& c) { c.workspace.data = static_cast<char*>(c.dv.data) + 16; },
         {"workspace", "memory that dv uses too"});
  refuse([](auto& c) { c.workspace.data = static_cast<char*>(c.lse.data) + 16; },
         {"workspace", "memory that lse uses too"});
}

// Guards against silent misreads: copies of 16 bytes from or to where there are none.
TEST_F(PlanBackwardOnGpu, WhatAConfigurationCannotCopyIsRefused) {
  BackwardConfig const config = default_backward_config(DType::bfloat16, 64, 100);
  for (auto const& [tensor, word] : {std::pair{&BackwardCall::q, "q's"}, std::pair{&BackwardCall::k, "k's"},
                                     std::pair{&BackwardCall::v, "v's"}, std::pair{&BackwardCall::out, "out's"},
                                     std::pair{&BackwardCall::dout, "dout's"}, std::pair{&BackwardCall::dq, "dq's"},
                                     std::pair{&BackwardCall::dk, "dk's"}, std::pair{&BackwardCall::dv, "dv's"}}) {
    BackwardCall call = call_;
    TensorView& t = call.*tensor;
    t.data = static_cast<char*>(t.data) + 2;
    call.refused<ConfigError>({word, "address is 2 bytes past a multiple of 16", "copy_bytes=2"}, config);
    BackwardConfig const chosen = backward_config_for(call.q, call.k, call.v, {{word, &t}});
    EXPECT_EQ(chosen.copy_bytes, 2);
    EXPECT_FALSE(chosen.async_copy);
  }
  BackwardCall narrow({1, 64, 1, 60}, {1, 64, 1, 60});
  narrow.refused<ConfigError>({"head_dim 60 is not a multiple of 8 elements"}, config);
  EXPECT_EQ(backward_config_for(narrow.q, narrow.k, narrow.v).copy_bytes, 8);
}

// Guards against tensors that no kernel takes, and against a message without the way out.
TEST_F(PlanBackwardOnGpu, WhatNoKernelTakesIsRefused) {
  auto const way_out = "torch.nn.functional.scaled_dot_product_attention";
  BackwardCall twice({1, 64, 1, 64}, {1, 64, 1, 64}, DType::float64);
  twice.refused<UnsupportedError>({"q: dtype float64", "float32", way_out});
  twice.refused<UnsupportedError>({"q: dtype", way_out}, BackwardConfig{.dtype = DType::float64, .head_dim = 64});
  EXPECT_THROW(backward_config_for(twice.q, twice.k, twice.v), UnsupportedError);
  EXPECT_THROW(backward_workspace_size({}, twice.q, twice.v), UnsupportedError);
  BackwardCall call = call_;
  call.refused<ConfigError>({"cfg: the rows and columns of a score tile", "block_n=32", "compute capability 10.0"},
                            BackwardConfig{.head_dim = 64, .block_n = 32});
  call.refused<ConfigError>({"cfg: head_dim 32 is smaller"}, BackwardConfig{.head_dim = 32});
  BackwardCall const widest({1, 64, 1, 256}, {1, 64, 1, 256});
  EXPECT_EQ(backward_config_for(widest.q, widest.k, widest.v), default_backward_config(DType::bfloat16, 256, 100));
  BackwardCall wide({1, 64, 1, 257}, {1, 64, 1, 257});
  wide.refused<ArgumentError>({"q: expected head_dim between 1 and 256, got 257"});
  EXPECT_THROW(backward_workspace_size(BackwardConfig{.block_m = 0}, call.q, call.v), ConfigError);
  call.k.device.index = 1;
  call.refused<ArgumentError>({"k", "cuda:0", "cuda:1"});
}

// Guards against a launch that cannot have its shared memory, where torch's own attention could train.
TEST_F(PlanBackwardOnGpu, Float32WithWideHeadsNeedsSharedMemory) {
  driver_->arch = 89;
  BackwardCall wide({1, 64, 1, 136}, {1, 64, 1, 136}, DType::float32);
  EXPECT_THROW(backward_config_for(wide.q, wide.k, wide.v), UnsupportedError);
  EXPECT_THROW(backward_workspace_size({}, wide.q, wide.v), UnsupportedError);
  BackwardCall const narrow({1, 64, 1, 128}, {1, 64, 1, 128}, DType::float32);
  EXPECT_EQ(backward_config_for(narrow.q, narrow.k, narrow.v), default_backward_config(DType::float32, 128, 89));
}

TEST_F(PlanBackwardOnGpu, TooOldAGpuIsRefused) {
  driver_->arch = 75;
  call_.refused<DeviceError>({"q: a GPU of compute capability 7.5 is too old"});
  call_.refused<DeviceError>({"q: a GPU of compute capability 7.5 is too old"}, BackwardConfig{.head_dim = 64});
}

}  // namespace
}  // namespace flashcute
