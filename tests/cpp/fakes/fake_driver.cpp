// A libcuda.so.1 that runs nothing and remembers what it was asked: the host side of the GPU path is tested
// with it on machines that have no GPU. `fake_driver` is how a test looks inside.
#include "fakes/fake_driver.hpp"

#include <cstring>

namespace {

FakeDriver state;

thread_local void* current_context = nullptr;

}  // namespace

extern "C" {

FakeDriver* fake_driver() { return &state; }

int cuInit(unsigned) { return state.init_result; }
int cuDriverGetVersion(int* version) { return *version = state.version, 0; }
int cuDeviceGetCount(int* count) { return *count = state.devices, 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
int cuDeviceGetName(char* name, int length, int) { return std::strncpy(name, "fake GPU", length), 0; }

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  int const arch = device == 2 ? 90 : state.arch;
  switch (attribute) {
    case 16: *value = state.multiprocessors; return 0;  // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
    case 75: *value = arch / 10; return 0;              // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    case 76: *value = arch % 10; return 0;              // ..._MINOR
    default: return 1;
  }
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
  ++state.contexts_retained;
  *context = reinterpret_cast<void*>(static_cast<std::uintptr_t>(0x1000 + device));
  return 0;
}

int cuCtxGetCurrent(void** context) { return *context = current_context, 0; }
int cuCtxPushCurrent(void* context) { return ++state.pushes, current_context = context, 0; }

int cuCtxPopCurrent(void** context) {
  ++state.pops;
  *context = current_context;
  current_context = nullptr;
  return 0;
}

int cuLibraryLoadData(void** library, void const* code, int*, void**, unsigned, int* options, void** values,
                      unsigned option_count) {
  std::lock_guard const lock(state.mutex);
  state.context_at_load = current_context;
  state.capture_mode_at_load = state.capture_mode;
  ++state.loads;
  state.last_load_copied = true;
  for (unsigned i = 0; i < option_count; ++i) {
    if (options[i] == 1 && values[i] != nullptr) state.last_load_copied = false;  // CU_LIBRARY_BINARY_IS_PRESERVED
  }
  *library = const_cast<void*>(code);
  return state.loads <= state.loads_that_succeed ? 0 : 1;
}

int cuLibraryGetKernel(void** kernel, void*, char const* name) {
  std::lock_guard const lock(state.mutex);
  state.kernel_name = name;
  *kernel = const_cast<std::string*>(&*state.kernels.insert(name).first);
  return 0;
}

int cuKernelGetFunction(void** function, void* kernel) { return *function = kernel, 0; }

int cuKernelSetAttribute(int attribute, int value, void*, int) {
  if (attribute == 8) state.max_dynamic_shared_bytes = value;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
  return 0;
}

struct LaunchConfig {  // CUlaunchConfig
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  void* stream;
  unsigned const* attributes;
  unsigned attribute_count;
};

int cuLaunchKernelEx(LaunchConfig const* c, void* function, void** parameters, void**) {
  std::lock_guard const lock(state.mutex);
  auto const& kernel = *static_cast<std::string const*>(function);
  FakeLaunch launch{kernel,          c->grid_x, c->grid_y, c->grid_z, c->block_x, c->shared_bytes, 1, c->stream,
                    current_context, {},        false,     {},        {}};
  for (unsigned i = 0; i < c->attribute_count; ++i) {
    unsigned const* const attribute = c->attributes + 18 * i;   // 72 bytes: its number, and after 8 the value
    if (attribute[0] == 4) launch.cluster_x = attribute[2];     // CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    if (attribute[0] == 6) launch.chained = attribute[2] == 1;  // ..._PROGRAMMATIC_STREAM_SERIALIZATION
  }
  if (kernel == "flashcute_make_block_map") {
    launch.map = *static_cast<flashcute::BlockMapRules const*>(parameters[0]);
  } else if (kernel.find("_bwd_") != std::string::npos) {
    auto const has = [&](char const* word) { return kernel.find(word) != std::string::npos; };
    bool const with_maps = has("_sm90_") && !has("_prepare") && !has("_finish");
    launch.backward = with_maps ? static_cast<flashcute::Sm90BackwardParams const*>(parameters[0])->backward
                                : *static_cast<flashcute::BackwardParams const*>(parameters[0]);
    launch.params = launch.backward->forward;
  } else if (kernel.find("_sm90_") != std::string::npos) {
    launch.params = static_cast<flashcute::Sm90ForwardParams const*>(parameters[0])->forward;
  } else {
    launch.params = *static_cast<flashcute::ForwardParams const*>(parameters[0]);
  }
  state.launches.push_back(launch);
  return state.launch_result;
}

int cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* address, std::uint64_t const* sizes,
                           std::uint64_t const* strides, unsigned const* box, unsigned const*, int, int swizzle, int,
                           int) {
  std::lock_guard const lock(state.mutex);
  FakeTensorMap made{type, address, {sizes, sizes + rank}, {strides, strides + rank - 1}, {box, box + rank}, swizzle};
  if (current_context == nullptr) return 201;  // CUDA_ERROR_INVALID_CONTEXT, as the driver
  state.tensor_maps.push_back(made);
  std::memset(map, 0, 128);
  return state.tensor_map_result;
}

int cuMemsetD32Async(std::uint64_t address, unsigned value, std::size_t count, void* stream) {
  std::lock_guard const lock(state.mutex);
  state.clears.push_back({address, value, count, stream, current_context});
  return 0;
}

int cuThreadExchangeStreamCaptureMode(int* mode) { return std::swap(*mode, state.capture_mode), 0; }
int cuGetErrorName(int error, char const** name) {
  return *name = error == 1 ? "CUDA_ERROR_FAKE" : "CUDA_ERROR_OTHER", 0;
}
int cuGetErrorString(int, char const** text) { return *text = "a fake failure", 0; }

/// What the library does not call in these tests exists all the same.
int unused_function() { return 1; }

int cuGetProcAddress_v2(char const* symbol, void** function, int, std::uint64_t, int* status) {
  struct Entry {
    char const* name;
    void* address;
  };
#define ENTRY(name)                       \
  {                                       \
    #name, reinterpret_cast<void*>(&name) \
  }
  static Entry const entries[] = {ENTRY(cuInit),
                                  ENTRY(cuDriverGetVersion),
                                  ENTRY(cuDeviceGetCount),
                                  ENTRY(cuDeviceGet),
                                  ENTRY(cuDeviceGetName),
                                  ENTRY(cuDeviceGetAttribute),
                                  ENTRY(cuDevicePrimaryCtxRetain),
                                  ENTRY(cuCtxGetCurrent),
                                  ENTRY(cuCtxPushCurrent),
                                  ENTRY(cuCtxPopCurrent),

                                  ENTRY(cuLibraryLoadData),
                                  ENTRY(cuLibraryGetKernel),
                                  ENTRY(cuKernelGetFunction),
                                  ENTRY(cuKernelSetAttribute),
                                  ENTRY(cuLaunchKernelEx),
                                  ENTRY(cuTensorMapEncodeTiled),
                                  ENTRY(cuMemsetD32Async),
                                  ENTRY(cuThreadExchangeStreamCaptureMode),
                                  ENTRY(cuGetErrorName),
                                  ENTRY(cuGetErrorString)};
#undef ENTRY
  *status = 0;
  *function = reinterpret_cast<void*>(&unused_function);
  for (Entry const& entry : entries) {
    if (std::strcmp(entry.name, symbol) == 0) *function = entry.address;
  }
  return 0;
}

}  // extern "C"
