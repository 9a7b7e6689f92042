// The host side of the GPU path, with a driver that runs nothing (fake_driver.cpp) and images of nothing
// (fake_images.cpp): what is loaded, prepared and launched, and which calls never reach the driver. Each test is a
// process of its own: what is loaded stays.
#include <gtest/gtest.h>
#include <malloc.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fakes/fake_gpu.hpp"
#include "flashcute/api.hpp"
#include "flashcute/core/defaults.hpp"
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

}  // namespace
}  // namespace flashcute
