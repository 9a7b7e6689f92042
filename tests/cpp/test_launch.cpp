// The host side of the GPU path, with a driver that runs nothing (fake_driver.cpp): what is loaded, prepared
// and launched, and which calls never reach the driver. Each test is a process of its own: what is loaded stays.
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <thread>

#include "device_memory.hpp"
#include "fake_driver.hpp"
#include "flashcute/api.hpp"
#include "image_store.hpp"

namespace flashcute {
namespace {

using namespace testing;

class Launch : public ::testing::Test {
 protected:
  void SetUp() override {
    // The library opens libcuda.so.1 by name and so meets this one, which is already there.
    void* const library = dlopen(FLASHCUTE_FAKE_DRIVER, RTLD_NOW | RTLD_LOCAL);
    ASSERT_NE(library, nullptr) << dlerror();
    auto const inside = reinterpret_cast<FakeDriver* (*)()>(dlsym(library, "fake_driver"));
    ASSERT_NE(inside, nullptr);
    driver_ = inside();
    if (image_archs().empty()) GTEST_SKIP() << "built without images";
  }

  static TensorView tensor(std::array<int64_t, 4> shape, int device = 0) {
    // Addresses are never read: the fake driver runs nothing.
    return dense_view(reinterpret_cast<void*>(std::uintptr_t{0x10000000}), DType::bfloat16, {DeviceType::cuda, device},
                      shape);
  }

  static TensorView output(std::array<int64_t, 4> shape, int device = 0) {
    TensorView t = tensor(shape, device);
    t.data = reinterpret_cast<void*>(std::uintptr_t{1} << 60);
    return t;
  }

  /// A call with one shape for all tensors.
  void run(std::array<int64_t, 4> shape, int device = 0, ForwardOptions const& options = {}) {
    TensorView const t = tensor(shape, device);
    forward(default_config(DType::bfloat16, shape[3], arch_of(t.device)), t, t, t, output(shape, device), nullptr,
            options);
  }

  FakeDriver* driver_ = nullptr;
};

// Guards against a wrong grid, too little shared memory, a stream or context that is not the caller's, and a
// context that is left behind on the thread.
TEST_F(Launch, PreparesOnceAndLaunchesOnTheCallersStream) {
  ForwardOptions options;
  options.causal = true;
  options.stream = reinterpret_cast<void*>(std::uintptr_t{0x77});
  run({3, 1000, 4, 128}, 1, options);
  run({3, 1000, 4, 128}, 1, options);

  ForwardConfig const config = default_config(DType::bfloat16, 128, 90);
  EXPECT_EQ(driver_->kernel_name, name(ForwardKernelId{config, {MaskKind::causal}}).text);
  EXPECT_EQ(driver_->loads, 1);
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

// Guards against T5: a failed launch that goes unnoticed.
TEST_F(Launch, AFailedLaunchRaisesAndNamesTheKernel) {
  driver_->launch_result = 1;
  try {
    run({1, 64, 1, 64});
    FAIL() << "no exception";
  } catch (DriverError const& e) {
    for (char const* word : {"cuLaunchKernel", "fwd_bf16_d64", "grid 1", "CUDA_ERROR_FAKE"}) {
      EXPECT_NE(std::string(e.what()).find(word), std::string::npos) << e.what();
    }
  }
}

// Guards against T4 and T16: grids of 65,536 and more go into x; empty problems launch nothing.
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

// Guards against T27: threads that race to prepare kernels, or launch before one is prepared.
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
  ForwardConfig const config = default_config(DType::bfloat16, 64, 90);
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
    EXPECT_EQ(check(chosen, 90), ForwardConfigError::none);
    EXPECT_EQ(explain(std::nullopt, t, k, t).rejected[1].first, "copy_bytes=16");
  };
  TensorView shifted = t;
  shifted.data = static_cast<char*>(shifted.data) + 2;
  refuse(shifted, {"k's address is 2 bytes past a multiple of 16", "copy_bytes=2 with async_copy=False"}, 2);
  TensorView odd = t;
  odd.strides[1] += 4;
  refuse(odd, {"k's seqlen stride 132 is no multiple of 8 elements", "copy_bytes=8"}, 8);
  EXPECT_THROW(run({1, 64, 1, 60}), ConfigError);
  EXPECT_EQ(driver_->loads, 0);
}

// Guards against a small grid that leaves most of the GPU idle, and against a tile for small grids on a large one.
TEST_F(Launch, SmallGridsTakeSmallerTiles) {
  auto const chosen = [&](std::array<int64_t, 4> shape) {
    TensorView const t = tensor(shape);
    return config_for(t, t, t, nullptr);
  };
  ForwardConfig const large = default_config(DType::bfloat16, 64, 90);
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

}  // namespace
}  // namespace flashcute
