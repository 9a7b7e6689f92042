// Test fixtures: GPUs whose driver runs nothing (fake_driver.cpp), and a compiler that compiles nothing
// (fake_nvrtc.cpp). Each test is a process of its own: what is loaded stays.
#pragma once

#include <dlfcn.h>
#include <gtest/gtest.h>

#include "fakes/fake_driver.hpp"
#include "flashcute/api.hpp"
#include "image/jit.hpp"
#include "support/device_memory.hpp"
#include "support/scratch.hpp"

namespace flashcute::testing {

class FakeGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    // The library opens libcuda.so.1 by name and so meets this one, which is already there.
    void* const library = dlopen(FLASHCUTE_FAKE_DRIVER, RTLD_NOW | RTLD_LOCAL);
    ASSERT_NE(library, nullptr) << dlerror();
    auto const inside = reinterpret_cast<FakeDriver* (*)()>(dlsym(library, "fake_driver"));
    ASSERT_NE(inside, nullptr);
    driver_ = inside();
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

  static constexpr int hopper = 2;  // the device of compute capability 9.0; the others have 10.0

  FakeDriver* driver_ = nullptr;
};

/// Kernels without an image are compiled at run time, here by a compiler that compiles nothing (fake_nvrtc.cpp).
class FakeGpuAndCompiler : public FakeGpu {
 protected:
  void SetUp() override {
    FakeGpu::SetUp();
    write_file(scratch_ / "include/cuda_fp16.h", "");
    set_include_folders({scratch_ / "include"});
  }

 private:
  Scratch scratch_;
  ScopedVariable nvrtc_{"FLASHCUTE_NVRTC", FLASHCUTE_FAKE_NVRTC};
  ScopedVariable include_{"FLASHCUTE_CUDA_INCLUDE", scratch_ / "include"};
  ScopedVariable cache_{"FLASHCUTE_CACHE_DIR", scratch_ / "cache"};
  ScopedVariable quiet_{"FLASHCUTE_QUIET", "1"};
};

}  // namespace flashcute::testing
