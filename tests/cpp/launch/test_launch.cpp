// The host side of the GPU path, with a driver that runs nothing (fake_driver.cpp) and images of nothing
// (fake_images.cpp): what is loaded, prepared
// and launched, and which calls never reach the driver. Each test is a process of its own: what is loaded stays.
#include <gtest/gtest.h>
#include <malloc.h>

#include <algorithm>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <thread>
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

class Launch : public FakeGpu {
 protected:
  /// A call with one shape for all tensors.
  void run(std::array<int64_t, 4> shape, int device = 0, CallOptions const& options = {}) {
    TensorView const t = tensor(shape, device);
    forward(default_config(DType::bfloat16, shape[3], arch_of(t.device)), t, t, t, output(shape, device), nullptr,
            options);
  }
};

// Guards against a wrong grid, too little shared memory, a stream or context that is not the caller's, and a
// context that is left behind on the thread.
TEST_F(Launch, PreparesOnceAndLaunchesOnTheCallersStream) {
  CallOptions options;
  options.causal = true;
  options.stream = reinterpret_cast<void*>(std::uintptr_t{0x77});
  run({3, 1000, 4, 128}, 1, options);
  run({3, 1000, 4, 128}, 1, options);

  ForwardConfig const config = default_config(DType::bfloat16, 128, 100);
  EXPECT_EQ(driver_->kernel_name, name(kernel_of(config, {MaskKind::causal})).text);
  EXPECT_EQ(driver_->loads, 1);
  EXPECT_FALSE(driver_->last_load_copied) << "the image lives as long as the library: a copy would be a second one";
  EXPECT_EQ(driver_->max_dynamic_shared_bytes, smem_bytes(config));
  EXPECT_EQ(driver_->capture_mode_at_load, 2) << "loading inside a graph capture needs the relaxed mode";
  EXPECT_EQ(driver_->capture_mode, 0) << "the caller's capture mode must come back";
  ASSERT_EQ(driver_->launches.size(), 2u);
  FakeLaunch const& launch = driver_->launches[1];
  EXPECT_EQ(launch.grid_x, 3u * 4 * ((1000 + config.block_m - 1) / config.block_m));
  EXPECT_EQ(launch.grid_y, 1u);
  EXPECT_EQ(launch.grid_z, 1u);
  EXPECT_EQ(launch.block_x, 32u * config.num_warps);
  EXPECT_EQ(launch.shared_bytes, static_cast<unsigned>(smem_bytes(config)));
  EXPECT_EQ(launch.stream, options.stream);
  EXPECT_EQ(launch.context, reinterpret_cast<void*>(std::uintptr_t{0x1001})) << "the primary context of device 1";
  EXPECT_EQ(driver_->pushes, driver_->pops);
  EXPECT_EQ(launch.params.seqlen_q, 1000);
  EXPECT_EQ(launch.params.q_stride.row, 4 * 128);
  EXPECT_EQ(launch.params.causal_offset, 0);
}

// Guards against a launch of Hopper's kernel with more blocks than run at once, without its maps or with wrong ones:
// the copy engine would read other rows than those of the tensors, or stop the GPU.
TEST_F(Launch, HopperTilesAreDealtToAsManyBlocksAsRun) {
  TensorView q = tensor({3, 1000, 8, 128}, hopper), k = tensor({3, 700, 2, 128}, hopper);
  ForwardConfig const config = config_for(q, k, k, nullptr);
  ASSERT_EQ(config.kernel, Kernel::sm90);
  forward(config, q, k, k, output({3, 1000, 8, 128}, hopper), nullptr);
  forward(config, tensor({1, 64, 1, 128}, hopper), tensor({1, 0, 1, 128}, hopper), tensor({1, 0, 1, 128}, hopper),
          output({1, 64, 1, 128}, hopper), nullptr);
  ASSERT_EQ(driver_->launches.size(), 2u);
  FakeLaunch const& launch = driver_->launches[0];
  EXPECT_EQ(launch.kernel, name(kernel_of(config, {MaskKind::full})).text);
  EXPECT_EQ(launch.grid_x, 132u);
  EXPECT_EQ(driver_->launches[1].grid_x, 1u);
  EXPECT_EQ(launch.cluster_x, 1u);
  EXPECT_EQ(launch.block_x, 32u * config.num_warps + 128u);
  EXPECT_EQ(launch.shared_bytes, static_cast<unsigned>(smem_bytes(config)));
  EXPECT_EQ(launch.params.seqlen_k, 700);
  ASSERT_EQ(driver_->tensor_maps.size(), 6u);
  FakeTensorMap const& q_map = driver_->tensor_maps[0];
  FakeTensorMap const& k_map = driver_->tensor_maps[1];
  EXPECT_EQ(q_map.address, q.data);
  EXPECT_EQ(q_map.sizes, (std::vector<std::uint64_t>{128, 1000, 8, 3}));
  EXPECT_EQ(q_map.strides, (std::vector<std::uint64_t>{8 * 128 * 2, 128 * 2, 1000 * 8 * 128 * 2}));
  EXPECT_EQ(q_map.box, (std::vector<unsigned>{64, 64, 1, 1}));
  EXPECT_EQ(k_map.sizes, (std::vector<std::uint64_t>{128, 700, 2, 3}));
  EXPECT_EQ(k_map.box, (std::vector<unsigned>{64, static_cast<unsigned>(config.block_n), 1, 1}));
  for (FakeTensorMap const& map : driver_->tensor_maps) {
    for (std::uint64_t const size : map.sizes) EXPECT_GT(size, 0u) << "the engine refuses empty dimensions";
    for (std::uint64_t const stride : map.strides) EXPECT_EQ(stride % 16, 0u);
  }
}

// Guards against boxes that are not the pages of the kernel's tiles, or in another swizzle.
TEST_F(Launch, HopperBoxesAreThePagesOfATile) {
  auto const maps_of = [&](int64_t d, int64_t d_v) {
    driver_->tensor_maps.clear();
    TensorView const q = tensor({1, 64, 1, d}, hopper), v = tensor({1, 64, 1, d_v}, hopper);
    forward(config_for(q, q, v, nullptr), q, q, v, output({1, 64, 1, d_v}, hopper), nullptr);
    std::vector<std::pair<unsigned, int>> boxes;  // columns, swizzle
    for (FakeTensorMap const& map : driver_->tensor_maps) boxes.emplace_back(map.box[0], map.swizzle);
    return boxes;
  };
  constexpr int bytes_64 = 2, bytes_128 = 3;
  std::pair const whole{64u, bytes_128}, half{32u, bytes_64};
  EXPECT_EQ(maps_of(128, 128), (std::vector{whole, whole, whole}));
  EXPECT_EQ(maps_of(96, 96), (std::vector{half, half, half}));
  EXPECT_EQ(maps_of(80, 72), (std::vector{half, half, half})) << "the tile's pages, not the tensors'";
  EXPECT_EQ(maps_of(192, 128), (std::vector{whole, whole, whole}));
  EXPECT_EQ(maps_of(192, 192), (std::vector{whole, whole, whole}));
}

/// An int32 array at an address that is never read.
TensorView words_view(int64_t size, std::uintptr_t address, Device device = {DeviceType::cuda, 1}) {
  TensorView t;
  t.data = reinterpret_cast<void*>(address);
  t.dtype = ElementType::int32;
  t.device = device;
  t.rank = 1;
  t.shape = {size};
  t.strides = {1};
  return t;
}

// Guards against counts of cells that are not cleared before they are counted, or on another stream than the kernel
// that counts, and a grid without some words.
TEST_F(Launch, ABlockMaskIsMadeOnTheCallersStream) {
  BlockMask mask{nullptr, 2, 3, 1000, 5000};
  TensorView const words = words_view(block_mask_size(mask, 10), 0x20000000);
  mask.words = &words;
  TensorView dense = tensor({2, 1, 1000, 5000}, 1);
  dense.dtype = ElementType::boolean;
  void* const stream = reinterpret_cast<void*>(std::uintptr_t{0x77});
  build_block_mask(mask, {.dense = &dense}, stream);

  ASSERT_EQ(driver_->clears.size(), 1u);
  EXPECT_EQ(driver_->clears[0].address, 0x20000000u);
  EXPECT_EQ(driver_->clears[0].value, 0u);
  EXPECT_EQ(driver_->clears[0].count, 4u);
  EXPECT_EQ(driver_->clears[0].stream, stream);
  ASSERT_EQ(driver_->launches.size(), 1u);
  FakeLaunch const& launch = driver_->launches[0];
  EXPECT_EQ(launch.kernel, "flashcute_make_block_map");
  EXPECT_EQ(launch.grid_x, 6u * 3 * (16 + 32)) << "3 squares of 16 rows by query and 32 by key, for each map";
  EXPECT_EQ(launch.stream, stream);
  EXPECT_EQ(launch.context, driver_->clears[0].context);
  ASSERT_TRUE(launch.map);
  EXPECT_EQ(launch.map->capacity, 10);
  EXPECT_EQ(launch.map->dense_stride[1], 0) << "one mask for all heads";
  EXPECT_EQ(launch.map->dense_stride[2], 5000);
}

// Guards against a map that a kernel reads with the strides of another, or that the host reads: it is in the GPU's
// memory.
TEST_F(Launch, ABlockMaskReachesTheKernel) {
  TensorView const t = tensor({2, 1000, 4, 128}, hopper);
  BlockMask mask{nullptr, 1, 4, 1000, 1000};
  TensorView const words = words_view(block_mask_size(mask), 0x20000000, t.device);
  mask.words = &words;
  CallOptions options;
  options.block_mask = mask;
  ForwardConfig const config = config_for(t, t, t, nullptr, options);
  EXPECT_EQ(config.kernel, Kernel::sm90);
  forward(config, t, t, t, output({2, 1000, 4, 128}, hopper), nullptr, options);
  ASSERT_EQ(driver_->launches.size(), 1u);
  EXPECT_EQ(driver_->launches[0].kernel, name(kernel_of(config, {MaskKind::mapped})).text);
  BlockMapParams const& map = driver_->launches[0].params.map;
  EXPECT_EQ(map.words, words.data);
  EXPECT_EQ(map.capacity, 4 * 16 * 16);
  EXPECT_EQ(map.batch_stride, 0);
  EXPECT_EQ(map.head_stride, 1);
}

TEST_F(Launch, ABlockMaskOfOtherLengthsIsRefused) {
  TensorView const t = tensor({2, 1000, 4, 128});
  BlockMask mask{nullptr, 1, 1, 4096, 4096};
  TensorView const words = words_view(block_mask_size(mask), 0x20000000, t.device);
  mask.words = &words;
  CallOptions options;
  options.block_mask = mask;
  try {
    config_for(t, t, t, nullptr, options);
    FAIL() << "no exception";
  } catch (ArgumentError const& e) {
    EXPECT_TRUE(contains(e.what(), "built for seqlen_q 1000, seqlen_k 1000")) << e.what();
    EXPECT_TRUE(contains(e.what(), "built for seqlen_q 4096, seqlen_k 4096")) << e.what();
  }
}

// Guards against a GPU with more multiprocessors than the deal's table has, of which some stay idle in silence.
TEST_F(Launch, ExplainTellsOfIdleMultiprocessors) {
  driver_->multiprocessors = 160;
  TensorView const t = tensor({4, 4096, 16, 128}, hopper);
  Explanation const e = explain(std::nullopt, t, t, t);
  ASSERT_EQ(e.notes.size(), 1u);
  EXPECT_TRUE(contains(e.notes[0], "144 multiprocessors at most: 16 of the 160"));
  forward(config_for(t, t, t, nullptr), t, t, t, output({4, 4096, 16, 128}, hopper), nullptr);
  EXPECT_EQ(driver_->launches.at(0).grid_x, 144u);
  TensorView const odd = tensor({4, 4096, 16, 100}, hopper);  // takes the road of mma.sync
  EXPECT_TRUE(explain(std::nullopt, odd, odd, odd).notes.empty());
}

// Guards against a refusal of the driver that goes unnoticed.
TEST_F(Launch, ARefusedTensorMapRaisesAndNamesTheTensor) {
  TensorView const t = tensor({1, 64, 1, 64}, hopper);
  driver_->tensor_map_result = 1;
  try {
    forward(config_for(t, t, t, nullptr), t, t, t, output({1, 64, 1, 64}, hopper), nullptr);
    FAIL() << "no exception";
  } catch (DriverError const& e) {
    EXPECT_NE(std::string(e.what()).find("cuTensorMapEncodeTiled(q)"), std::string::npos) << e.what();
  }
  EXPECT_TRUE(driver_->launches.empty());
}

// Guards against tensors that the copy engine cannot walk: they take the road of mma.sync, and explain says why.
TEST_F(Launch, WhatTheCopyEngineCannotWalkTakesTheOtherRoad) {
  TensorView const t = tensor({2, 64, 2, 64}, hopper);
  ForwardConfig const hoppers = config_for(t, t, t, nullptr);
  EXPECT_EQ(explain(std::nullopt, t, t, t).backend, "sm90");
  auto const refuse = [&](TensorView const& k, char const* why) {
    EXPECT_THROW(forward(hoppers, t, k, t, output({2, 64, 2, 64}, hopper), nullptr), ConfigError);
    EXPECT_EQ(config_for(t, k, t, nullptr).math, Math::tensor_core);
    Explanation const e = explain(std::nullopt, t, k, t);
    EXPECT_EQ(e.backend, "sm80");
    EXPECT_EQ(e.rejected[1].first, "sm90");
    EXPECT_NE(e.rejected[1].second.find(why), std::string::npos) << e.rejected[1].second;
  };
  TensorView shifted = t;
  shifted.data = static_cast<char*>(shifted.data) + 8;
  refuse(shifted, "k's address is 8 bytes past a multiple of 16");
  TensorView backwards = t;
  backwards.strides[1] = -backwards.strides[1];
  refuse(backwards, "k's seqlen stride -128");
  TensorView far = t;
  far.strides[0] = int64_t{1} << 39;
  refuse(far, "k's batch stride");
}

// Guards against a failed launch that goes unnoticed.
TEST_F(Launch, AFailedLaunchRaisesAndNamesTheKernel) {
  driver_->launch_result = 1;
  try {
    run({1, 64, 1, 64});
    FAIL() << "no exception";
  } catch (DriverError const& e) {
    for (char const* word : {"cuLaunchKernelEx", "fwd_bf16_d64", "grid 1", "CUDA_ERROR_FAKE"}) {
      EXPECT_NE(std::string(e.what()).find(word), std::string::npos) << e.what();
    }
  }
}

// Grids of 65,536 and more go into x; empty problems launch nothing.
TEST_F(Launch, GridsAreOneDimensional) {
  run({65537, 1, 1, 64});
  ASSERT_EQ(driver_->launches.size(), 1u);
  EXPECT_EQ(driver_->launches[0].grid_x, 65537u);
  run({0, 64, 1, 64});
  run({1, 0, 1, 64});
  run({1, 64, 0, 64});
  EXPECT_EQ(driver_->launches.size(), 1u);
}

TEST_F(Launch, ATooLargeGridIsRefused) {
  EXPECT_THROW(run({1 << 20, 128 * 256, 64, 64}), UnsupportedError);
  EXPECT_TRUE(driver_->launches.empty());
}

// Guards against threads that race to prepare kernels, or launch before one is prepared.
TEST_F(Launch, ThreadsPrepareEachKernelOncePerDevice) {
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([this, i] {
      for (int repeat = 0; repeat < 50; ++repeat) run({1, 64, 1, i % 2 == 0 ? 64 : 128}, i / 4);
    });
  }
  for (auto& t : threads) t.join();
  EXPECT_EQ(driver_->launches.size(), 400u);
  EXPECT_EQ(driver_->loads, 4) << "two kernels on two devices";
  EXPECT_EQ(driver_->contexts_retained, 2);
}

// Guards against a crash in the driver where GPU or driver are too old.
TEST_F(Launch, TooOldAGpuIsRefused) {
  driver_->arch = 75;
  EXPECT_THROW(run({1, 64, 1, 64}), Error);
  EXPECT_TRUE(driver_->launches.empty());
  EXPECT_EQ(driver_->loads, 0);
}

TEST_F(Launch, TooOldADriverIsRefused) {
  driver_->version = 12020;
  EXPECT_THROW(run({1, 64, 1, 64}), DeviceError);
  EXPECT_EQ(driver_->loads, 0);
}

TEST_F(Launch, AMissingDeviceIsRefused) { EXPECT_THROW(run({1, 64, 1, 64}, 5), DeviceError); }

TEST_F(Launch, ADriverThatDoesNotInitialiseIsReported) {
  driver_->init_result = 1;
  EXPECT_THROW(run({1, 64, 1, 64}), DeviceError);
  EXPECT_FALSE(driver_info().available);
  EXPECT_NE(driver_info().problem.find("CUDA_ERROR_FAKE"), std::string::npos);
}

// Guards against silent misreads: copies of 16 bytes from where there are none are refused before anything is loaded.
TEST_F(Launch, WhatAConfigurationCannotCopyIsRefused) {
  TensorView const t = tensor({1, 64, 2, 64});
  ForwardConfig const config = default_config(DType::bfloat16, 64, 100);
  auto const refuse = [&](TensorView const& k, std::initializer_list<char const*> words, int fitting) {
    try {
      forward(config, t, k, t, output({1, 64, 2, 64}), nullptr);
      FAIL() << "no exception for " << *words.begin();
    } catch (ConfigError const& e) {
      for (char const* word : words) EXPECT_NE(std::string(e.what()).find(word), std::string::npos) << e.what();
    }
    ForwardConfig const chosen = config_for(t, k, t, nullptr);
    EXPECT_EQ(chosen.copy_bytes, fitting);
    EXPECT_EQ(chosen.async_copy, fitting >= 4);
    EXPECT_EQ(check(chosen, 100), ForwardConfigError::none);
    EXPECT_EQ(explain(std::nullopt, t, k, t).rejected[1].first, "copy_bytes=16");
  };
  TensorView shifted = t;
  shifted.data = static_cast<char*>(shifted.data) + 2;
  refuse(shifted, {"k's address is 2 bytes past a multiple of 16", "copy_bytes=2 with async_copy=False"}, 2);
  TensorView odd = t;
  odd.strides[1] += 4;
  refuse(odd, {"k's seqlen stride 132 is not a multiple of 8 elements", "copy_bytes=8"}, 8);
  EXPECT_THROW(run({1, 64, 1, 60}), ConfigError);
  EXPECT_EQ(driver_->loads, 0);
}

// Guards against a small grid that leaves most of the GPU idle, and against a tile for small grids on a large one.
TEST_F(Launch, SmallGridsTakeSmallerTiles) {
  auto const chosen = [&](std::array<int64_t, 4> shape) {
    TensorView const t = tensor(shape);
    return config_for(t, t, t, nullptr);
  };
  ForwardConfig const large = default_config(DType::bfloat16, 64, 100);
  EXPECT_EQ(chosen({1, 128 * 132, 1, 64}), large);
  EXPECT_EQ(chosen({132, 1, 1, 64}), large);
  ForwardConfig const small = chosen({1, 128 * 131, 1, 64});
  EXPECT_LT(small.block_m, large.block_m);
  EXPECT_EQ(small.block_n, large.block_n) << "the bits of a row would depend on its batch mates";
  EXPECT_EQ(chosen({131, 1, 1, 64}), small);
  EXPECT_EQ(explain(std::nullopt, tensor({1, 64, 1, 64}), tensor({1, 64, 1, 64}), tensor({1, 64, 1, 64})).image,
            "ahead of time");
}

// explain tells before anything runs, and launches nothing.
TEST_F(Launch, ExplainLaunchesNothing) {
  TensorView const t = tensor({1, 64, 1, 64});
  Explanation const e = explain(std::nullopt, t, t, t);
  EXPECT_EQ(e.backend, "sm80");
  EXPECT_EQ(e.image, "ahead of time");
  EXPECT_EQ(driver_->loads, 0);
  EXPECT_TRUE(driver_->launches.empty());
}

class ExplainCall : public FakeGpuAndCompiler {};

/// The lines of an explanation that hold `word`.
std::string lines_with(std::string const& word, Explanation const& e) {
  std::istringstream text(to_string(e));
  std::string found;
  for (std::string line; std::getline(text, line);) {
    if (line.find(word) != std::string::npos) found += line + "\n";
  }
  return found;
}

// Guards against an explanation that tells what runs on an H100 and not why, or tells it of another GPU's kernel.
TEST_F(ExplainCall, SaysWhyHoppersKernelWasChosen) {
  TensorView const t = tensor({2, 4096, 16, 88}, hopper);
  Explanation const e = explain(std::nullopt, t, t, t);
  EXPECT_EQ(e.reasons.size(), 3u);
  EXPECT_EQ(lines_with("why", e), "  why     The tensors are on cuda:2, a GPU of compute capability 9.0.\n");
  EXPECT_NE(lines_with("Hopper's kernel (copies by TMA", e), "");
  EXPECT_NE(lines_with("Tiles of 128 query rows and blocks of 128 keys are the default for head dimensions up to 96. "
                       "A head dimension of 88 is padded with zeros and computed as one of 96.",
                       e),
            "");

  ForwardConfig const asked = *e.config;
  EXPECT_NE(lines_with("cfg asks for this configuration.", explain(asked, t, t, t)), "");
  EXPECT_EQ(lines_with("Tiles of", explain(asked, t, t, t)), "");
}

// Guards against reasons of one kernel told of another: float32, tensors that the copy engine cannot read, small grids.
TEST_F(ExplainCall, SaysWhyTheMmaSyncKernelWasChosen) {
  TensorView f32 = tensor({2, 4096, 16, 64}, hopper);
  f32.dtype = ElementType::float32;
  Explanation const exact = explain(std::nullopt, f32, f32, f32);
  EXPECT_NE(
      lines_with("Hopper's kernel takes float16 and bfloat16 only. It multiplies float32 on tensor cores by three",
                 exact),
      "");
  CallOptions fast;
  fast.allow_tf32 = true;
  EXPECT_NE(lines_with("FLASHCUTE_JIT=fastest", explain(std::nullopt, f32, f32, f32, fast)), "");
  {
    ScopedVariable const fastest("FLASHCUTE_JIT", "fastest");
    EXPECT_NE(lines_with("allow_tf32 lets it round", explain(std::nullopt, f32, f32, f32, fast)), "");
  }

  TensorView shifted = tensor({2, 4096, 16, 64}, hopper);
  shifted.data = static_cast<char*>(shifted.data) + 8;
  Explanation const misaligned = explain(std::nullopt, shifted, shifted, shifted);
  EXPECT_NE(lines_with("It copies 8 bytes at a time", misaligned), "");
  EXPECT_NE(lines_with("sm90, copy_bytes=16: q's address is 8 bytes past a multiple of 16", misaligned), "")
      << to_string(misaligned);

  TensorView const large = tensor({2, 4096, 16, 64}), small = tensor({1, 64, 1, 64});
  EXPECT_EQ(lines_with("without work", explain(std::nullopt, large, large, large)), "");
  EXPECT_NE(lines_with("where tiles of 128 rows would leave multiprocessors without work",
                       explain(std::nullopt, small, small, small)),
            "");
}

// Guards against dozens of lines, one for each configuration that was not taken: they are grouped by their reason, and
// the data still has all of them.
TEST_F(ExplainCall, GroupsWhatWasNotTakenByReason) {
  TensorView const t = tensor({2, 4096, 16, 64}, hopper);
  Explanation const e = explain(std::nullopt, t, t, t);
  EXPECT_EQ(e.rejected.size(), 1 + configs().size() - 1) << "the CPU, and all configurations but the one that runs";
  std::set<std::string> reasons;
  for (auto const& [what, reason] : e.rejected) reasons.insert(reason);
  EXPECT_LE(reasons.size(), 6u);
  std::string const text = to_string(e);
  for (std::string const& reason : reasons) EXPECT_NE(text.find(": " + reason), std::string::npos) << reason;
  EXPECT_NE(lines_with("9 ahead-of-time configurations: dtype float16 does not fit the tensors' bfloat16", e), "")
      << text;
  EXPECT_LT(std::ranges::count(text, '\n'), 14) << text;
}

// ---- what explain says of gradients ------------------------------------------------------------------

/// Of a call with one shape for all tensors.
BackwardExplanation gradients_of(TensorView const& t, CallOptions options = {}) {
  options.gradients_follow = true;
  return explain(std::nullopt, t, t, t, options).gradients.value();
}

bool is_rejected(BackwardExplanation const& e, std::string const& what, char const* why) {
  return std::ranges::any_of(e.rejected,
                             [&](auto const& pair) { return pair.first == what && contains(pair.second, why); });
}

// Guards against an explanation of other gradients than those that are computed.
TEST_F(ExplainCall, TellsOfTheGradientsThatRun) {
  TensorView const t = tensor({2, 1000, 4, 64}, hopper);
  EXPECT_EQ(explain(std::nullopt, t, t, t).gradients, std::nullopt) << "nobody asked";
  CallOptions options;
  options.causal = true;
  for (bool const deterministic : {false, true}) {
    options.deterministic = deterministic;
    BackwardExplanation const e = gradients_of(t, options);
    BackwardConfig const config = backward_config_for(t, t, t, {}, options);
    EXPECT_EQ(e.backend, "sm90");
    EXPECT_EQ(e.config, config);
    EXPECT_EQ(e.same_bits, deterministic);
    EXPECT_EQ(e.workspace_bytes, 4 * backward_workspace_size({}, t, t, options));
    ASSERT_EQ(e.kernels.size(), 3u);
    std::size_t next = 0;
    for (BackwardPass const pass : passes_of(config)) {
      auto const& [kernel, image] = e.kernels[next++];
      EXPECT_EQ(kernel, name(kernel_of(config, pass, {MaskKind::causal})).text);
      EXPECT_TRUE(contains(image, "ahead of time")) << image;
    }
    EXPECT_EQ(e.notes.size(), 0u);
    EXPECT_TRUE(contains(e.reasons[1], deterministic ? "in a fixed order" : "last bits differ from run to run"));
    EXPECT_EQ(is_rejected(e, "deterministic=False", "faster"), deterministic);
  }
  options.window_left = 8;  // under which bits that are the same in every run are those of the mma.sync kernels
  BackwardExplanation const two_passes = gradients_of(t, options);
  EXPECT_EQ(two_passes.backend, "sm80");
  EXPECT_TRUE(is_rejected(two_passes, "sm90", "of full and causal masks only"));
  EXPECT_TRUE(contains(two_passes.kernels.at(0).second, "run-time compilation, once"));
  EXPECT_TRUE(contains(two_passes.notes.at(0), "2 of 2 kernels")) << "a first call that waits for a compiler";
  EXPECT_EQ(driver_->loads, 0);
}

// Guards against an alternative without its reason, and against reasons of the forward.
TEST_F(ExplainCall, SaysWhyTheGradientsOfThisConfiguration) {
  TensorView const t = tensor({2, 1000, 4, 60});
  BackwardExplanation const e = gradients_of(t);
  EXPECT_TRUE(is_rejected(e, "cpu", "the tensors are on cuda:0"));
  EXPECT_TRUE(is_rejected(e, "copy_bytes=16", "head_dim 60 is not a multiple of 8 elements"));
  for (BackwardConfig const& other : backward_configs())
    EXPECT_TRUE(is_rejected(e, name(other).text, "")) << name(other).text;
  ASSERT_EQ(e.reasons.size(), 3u);
  EXPECT_TRUE(contains(e.reasons[1], "last bits differ from run to run"));
  EXPECT_TRUE(contains(e.reasons[2], "A head dimension of 60 is padded"));
  EXPECT_TRUE(contains(e.reasons[2], "copies 8 bytes at a time"));
  EXPECT_FALSE(contains(e.reasons[2], "shared memory"));
  driver_->arch = 89;
  TensorView const wide = tensor({2, 1000, 4, 256}, 1);
  EXPECT_TRUE(contains(gradients_of(wide).reasons.at(2), "no more than 101376 bytes of shared memory"));
  CallOptions options;
  options.gradients_follow = true;
  std::string const text = to_string(explain(std::nullopt, t, t, t, options));
  EXPECT_TRUE(contains(text, "\ngradients by backend sm80\n  why     The tensors are on cuda:0")) << text;
  EXPECT_TRUE(contains(text, "  memory  a workspace of "));
  EXPECT_TRUE(contains(text, "  kernels " + e.kernels[0].first + "\n          " + e.kernels[1].first)) << text;
  EXPECT_TRUE(contains(text, "\n  image   " + e.kernels[0].second + "\n")) << "all have this one";
  BackwardExplanation two_origins = e;
  two_origins.kernels[1].second = "disk cache";
  EXPECT_TRUE(contains(to_string(two_origins), "\n  image   disk cache: " + e.kernels[1].first + "\n"));
  EXPECT_TRUE(contains(text, "  bits    those of dq differ from run to run"));
}

// Guards against gradients that are promised where a call for them raises: no kernel, a launch too large, no image.
TEST_F(ExplainCall, SaysWhatKeepsGradientsFromBeingComputed) {
  driver_->arch = 89;
  TensorView f32 = tensor({1, 64, 1, 136});
  f32.dtype = ElementType::float32;
  BackwardExplanation const none = gradients_of(f32);
  EXPECT_EQ(none.backend, "");
  EXPECT_EQ(none.config, std::nullopt);
  EXPECT_TRUE(is_rejected(none, "sm80", "need more shared memory than this GPU has"));
  EXPECT_TRUE(contains(to_string(none), "no kernel computes gradients of this call"));
  TensorView const q = tensor({1 << 17, 1, 1 << 14, 8}), k = tensor({1 << 17, 0, 1 << 14, 8});
  CallOptions options;
  options.gradients_follow = true;
  Explanation const large = explain(std::nullopt, q, k, k, options);
  EXPECT_TRUE(is_rejected(large.gradients.value(), "sm80", "Split the batch"));
  ScopedVariable const off("FLASHCUTE_JIT", "off");
  options.deterministic = true;
  TensorView const t = tensor({1, 64, 1, 64});
  EXPECT_TRUE(contains(gradients_of(t, options).kernels.at(0).second, "none: it is not among the kernels"));
  TensorView const wrong = tensor({1, 63, 1, 64});
  EXPECT_EQ(explain(std::nullopt, t, t, wrong, options).gradients, std::nullopt);
}

// Guards against a choice that forgets where the output goes, which `forward` looks at.
TEST_F(ExplainCall, LooksAtTheOutput) {
  TensorView const t = tensor({2, 64, 2, 64});
  TensorView out = output({2, 64, 2, 64});
  out.data = static_cast<char*>(out.data) + 8;
  Explanation const e = explain(std::nullopt, t, t, t, {}, &out);
  EXPECT_EQ(e.config, config_for(t, t, t, &out));
  EXPECT_EQ(e.config.value().copy_bytes, 8);
  out.shape[1] = 63;
  EXPECT_EQ(explain(std::nullopt, t, t, t, {}, &out).backend, "");
}

// ---- the backward ----------------------------------------------------------------------------------

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

class LaunchCompiled : public FakeGpuAndCompiler {};

// Guards against an image that is in memory twice, as the driver's copy and as ours: one of 1 MiB is compiled and one
// is read from the disk cache. Also against a driver that makes no copy of what is freed.
TEST_F(LaunchCompiled, TheImageIsFreedWhenTheDriverHasIt) {
  ScopedVariable const force("FLASHCUTE_JIT", "force");
  auto const bytes_in_use = [] {
    struct mallinfo2 const heap = mallinfo2();
    return static_cast<int64_t>(heap.uordblks + heap.hblkhd);
  };
  auto const run = [&](int64_t head_dim, int device) {
    TensorView const t = tensor({1, 64, 1, head_dim}, device);
    forward(default_config(DType::bfloat16, head_dim, 100), t, t, t, output({1, 64, 1, head_dim}, device), nullptr);
  };
  run(64, 0);  // what is made once is made here
  int64_t const before = bytes_in_use();
  run(128, 0);  // compiled
  run(128, 1);  // read
  EXPECT_EQ(driver_->loads, 3);
  EXPECT_TRUE(driver_->last_load_copied);
  EXPECT_LT(bytes_in_use() - before, 1 << 20);
}

// Guards against thread blocks that load half of K and V, without others that load the rest.
TEST_F(LaunchCompiled, ThreadBlocksOfAClusterAreLaunchedTogether) {
  TensorView const q = tensor({3, 1000, 8, 128}, hopper), k = tensor({3, 700, 2, 128}, hopper);
  ForwardConfig config = config_for(q, k, k, nullptr);
  config.cluster = 2;
  forward(config, q, k, k, output({3, 1000, 8, 128}, hopper), nullptr);
  FakeLaunch const& launch = driver_->launches.at(0);
  EXPECT_EQ(launch.cluster_x, 2u);
  EXPECT_EQ(launch.grid_x, 2u * std::min(3 * 8 * 4, 132 / 2)) << "tiles of 256 rows";
  auto const half = static_cast<unsigned>(config.block_n / 2);
  EXPECT_EQ(driver_->tensor_maps.at(0).box, (std::vector<unsigned>{64, 64, 1, 1})) << "q";
  EXPECT_EQ(driver_->tensor_maps.at(1).box, (std::vector<unsigned>{64, half, 1, 1})) << "k";
  EXPECT_EQ(driver_->tensor_maps.at(2).box, (std::vector<unsigned>{64, half, 1, 1})) << "v";
}

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
