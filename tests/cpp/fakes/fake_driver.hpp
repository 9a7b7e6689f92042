// What the fake libcuda.so.1 answers, and what it was asked.
#pragma once

#include <cstdint>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "flashcute/core/backward_params.hpp"
#include "flashcute/policy/block_map_rules.hpp"
#include "flashcute/sm90/params.hpp"

struct FakeLaunch {
  std::string kernel;
  unsigned grid_x, grid_y, grid_z, block_x, shared_bytes, cluster_x;
  void* stream;
  void* context;
  flashcute::ForwardParams params;
  bool chained = false;                               // to the launch before it
  std::optional<flashcute::BackwardParams> backward;  // of its kernels
  std::optional<flashcute::BlockMapRules> map;        // of the kernel that makes maps
};

struct FakeClear {
  std::uint64_t address;
  unsigned value;
  std::size_t count;
  void *stream, *context;
};

struct FakeTensorMap {
  int type;
  void* address;
  std::vector<std::uint64_t> sizes, strides;
  std::vector<unsigned> box;
  int swizzle;
};

struct FakeDriver {
  // answers
  int init_result = 0;
  int version = 13000;
  int devices = 3;
  int arch = 100;  // of all but the last, which is 90
  int multiprocessors = 132;
  int launch_result = 0;
  int tensor_map_result = 0;
  int loads_that_succeed = 1 << 30;
  int capture_mode = 0;  // CU_STREAM_CAPTURE_MODE_GLOBAL

  // questions
  std::mutex mutex;
  int contexts_retained = 0, pushes = 0, pops = 0, loads = 0;
  int max_dynamic_shared_bytes = 0;
  int capture_mode_at_load = -1;
  void* context_at_load = nullptr;
  bool last_load_copied = true;  // the driver was not told that the image stays where it is
  std::string kernel_name;
  std::set<std::string> kernels;  // by name, whose address is the kernel's handle
  std::vector<FakeLaunch> launches;
  std::vector<FakeTensorMap> tensor_maps;
  std::vector<FakeClear> clears;
};

extern "C" FakeDriver* fake_driver();
