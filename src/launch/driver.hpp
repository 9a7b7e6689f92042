// The CUDA driver, opened at run time: nothing links libcuda, so the library loads on any machine. Its prototypes are
// declared here and <cuda.h> is not included: its types differ between CUDA 12 and 13, and a machine without a toolkit
// does not have it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "flashcute/api.hpp"

namespace flashcute::cuda {

using Result = int;
using DeviceHandle = int;
using Context = struct ContextTag*;
using Stream = void*;
using Library = struct LibraryTag*;
using Kernel = struct KernelTag*;
using Function = struct FunctionTag*;

/// CUlaunchAttribute and CUlaunchConfig, as far as they are used here.
struct LaunchAttribute {
  int id;
  char padding[4];
  unsigned value[16];
};
inline constexpr int attribute_cluster_dimension = 4, attribute_programmatic_stream_serialization = 6;
struct LaunchConfig {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  Stream stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};
static_assert(sizeof(LaunchAttribute) == 72 && sizeof(LaunchConfig) == 56);

inline constexpr Result success = 0;

/// The driver functions that flashcute uses, each with the CUDA version whose ABI is requested. Field names are the
/// API's names.
#define FLASHCUTE_DRIVER_FUNCTIONS(F)                                                                                \
  F(cuInit, 2000, (unsigned flags))                                                                                  \
  F(cuDriverGetVersion, 2020, (int* version))                                                                        \
  F(cuDeviceGetCount, 2000, (int* count))                                                                            \
  F(cuDeviceGet, 2000, (DeviceHandle * device, int ordinal))                                                         \
  F(cuDeviceGetName, 2000, (char* name, int length, DeviceHandle device))                                            \
  F(cuDeviceGetAttribute, 2000, (int* value, int attribute, DeviceHandle device))                                    \
  F(cuDevicePrimaryCtxRetain, 7000, (Context * context, DeviceHandle device))                                        \
  F(cuCtxGetCurrent, 4000, (Context * context))                                                                      \
  F(cuCtxPushCurrent, 4000, (Context context))                                                                       \
  F(cuCtxPopCurrent, 4000, (Context * context))                                                                      \
  F(cuLibraryLoadData, 12000,                                                                                        \
    (Library * library, void const* code, int* jit_options, void** jit_values, unsigned jit_count,                   \
     int* library_options, void** library_values, unsigned library_count))                                           \
  F(cuLibraryGetKernel, 12000, (Kernel * kernel, Library library, char const* name))                                 \
  F(cuKernelGetFunction, 12000, (Function * function, Kernel kernel))                                                \
  F(cuKernelSetAttribute, 12000, (int attribute, int value, Kernel kernel, DeviceHandle device))                     \
  F(cuLaunchKernelEx, 11060, (LaunchConfig const* config, Function function, void** parameters, void** extra))       \
  F(cuTensorMapEncodeTiled, 12000,                                                                                   \
    (void* map, int type, unsigned rank, void* address, std::uint64_t const* sizes, std::uint64_t const* strides,    \
     unsigned const* box, unsigned const* element_strides, int interleave, int swizzle, int l2_promotion, int fill)) \
  F(cuMemsetD32Async, 3020, (std::uint64_t address, unsigned value, std::size_t count, Stream stream))               \
  F(cuThreadExchangeStreamCaptureMode, 10010, (int* mode))                                                           \
  F(cuGetErrorName, 6000, (Result error, char const** name))                                                         \
  F(cuGetErrorString, 6000, (Result error, char const** text))

struct Driver {
#define FLASHCUTE_DECLARE(name, version, parameters) Result(*name) parameters = nullptr;
  FLASHCUTE_DRIVER_FUNCTIONS(FLASHCUTE_DECLARE)
#undef FLASHCUTE_DECLARE

  int version = 0;  // highest CUDA version the driver supports, 13000 for 13.0
  int devices = 0;
};

/// Address of a driver function as it was in CUDA `version` (2000 for 2.0), or null. Throws DeviceError if there is no
/// driver.
void* driver_function(char const* name, int version);

/// The initialised driver; opens and initialises it on the first call. Throws a DeviceError that says why there is
/// none. Safe from any thread. CUDA cannot be used in a forked child of a process that has used it; in a child of one
/// that has not, it can.
Driver const& driver();

/// Throws DriverError "<what>: CUDA_ERROR_... (explanation)" unless result is success.
void check_result(Result result, std::string const& what);

Arch device_arch(int ordinal);
std::string device_name(int ordinal);

/// Facts about a device that a launch needs, read once. Throws DeviceError for an ordinal that does not exist.
struct DeviceFacts {
  DeviceHandle handle;
  Context primary_context;  // retained for the life of the process: frameworks share it
  Arch arch;
  int multiprocessors;
};
DeviceFacts const& device_facts(int ordinal);

/// Throws DeviceError unless the driver can load images of this CUDA version (13000 for 13.0): an image loads on
/// drivers of the same major version or a later one.
void require_driver_for(int image_cuda_version, int driver_cuda_version);

/// Makes a context current for a scope, and restores the previous one.
class ContextGuard {
 public:
  explicit ContextGuard(Context context);
  ~ContextGuard();
  ContextGuard(ContextGuard const&) = delete;
  ContextGuard& operator=(ContextGuard const&) = delete;

 private:
  bool pushed_ = false;
};

/// Lets this thread load kernels while a thread captures a CUDA graph (CU_STREAM_CAPTURE_MODE_RELAXED).
class RelaxedCapture {
 public:
  RelaxedCapture();
  ~RelaxedCapture();
  RelaxedCapture(RelaxedCapture const&) = delete;
  RelaxedCapture& operator=(RelaxedCapture const&) = delete;

 private:
  int mode_ = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED
};

}  // namespace flashcute::cuda
