// GPU memory and streams for C++ tests and benchmarks, through the driver that the library opens.
#pragma once

#include <array>
#include <cstring>
#include <vector>

#include "launch/driver.hpp"

namespace flashcute::testing {

using DevicePointer = std::uint64_t;

/// What tests and benchmarks ask of the driver beside what the library does.
#define FLASHCUTE_TEST_DRIVER_FUNCTIONS(F)                                        \
  F(cuCtxSynchronize, 2000, ())                                                   \
  F(cuMemAlloc, 3020, (DevicePointer * pointer, std::size_t bytes))               \
  F(cuMemFree, 3020, (DevicePointer pointer))                                     \
  F(cuMemcpyHtoD, 3020, (DevicePointer to, void const* from, std::size_t bytes))  \
  F(cuMemcpyDtoH, 3020, (void* to, DevicePointer from, std::size_t bytes))        \
  F(cuMemsetD8, 3020, (DevicePointer to, unsigned char value, std::size_t bytes)) \
  F(cuEventCreate, 2000, (void** event, unsigned flags))                          \
  F(cuEventDestroy, 4000, (void* event))                                          \
  F(cuEventRecord, 2000, (void* event, cuda::Stream stream))                      \
  F(cuEventSynchronize, 2000, (void* event))                                      \
  F(cuEventElapsedTime, 2000, (float* milliseconds, void* from, void* to))

struct TestDriver {
#define FLASHCUTE_DECLARE(name, version, parameters) \
  cuda::Result(*name) parameters = reinterpret_cast<cuda::Result(*) parameters>(cuda::driver_function(#name, version));
  FLASHCUTE_TEST_DRIVER_FUNCTIONS(FLASHCUTE_DECLARE)
#undef FLASHCUTE_DECLARE
};

inline TestDriver const& test_driver() {
  static TestDriver const d;
  return d;
}

/// Whether there is a GPU that the kernels run on.
inline bool has_gpu() {
  DriverInfo const info = driver_info();
  return !info.gpus.empty() && info.gpus[0].arch >= 80;
}

/// Memory of GPU 0 that holds a copy of host values. A guard band behind it shows writes past the end.
class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t bytes, unsigned char fill = 0xff)
      : guard_(cuda::device_facts(0).primary_context), bytes_(bytes) {
    cuda::check_result(test_driver().cuMemAlloc(&pointer_, bytes + guard_bytes), "cuMemAlloc");
    cuda::check_result(test_driver().cuMemsetD8(pointer_, fill, bytes + guard_bytes), "cuMemsetD8");
  }
  template <class T>
  explicit DeviceMemory(std::vector<T> const& host) : DeviceMemory(host.size() * sizeof(T)) {
    if (bytes_ == 0) return;
    cuda::check_result(test_driver().cuMemcpyHtoD(pointer_, host.data(), bytes_), "cuMemcpyHtoD");
  }
  DeviceMemory(DeviceMemory const&) = delete;
  DeviceMemory& operator=(DeviceMemory const&) = delete;
  ~DeviceMemory() { test_driver().cuMemFree(pointer_); }

  void* data() const { return reinterpret_cast<void*>(pointer_); }

  template <class T>
  std::vector<T> download() const {
    std::vector<T> host(bytes_ / sizeof(T));
    cuda::check_result(test_driver().cuCtxSynchronize(), "cuCtxSynchronize");
    if (bytes_ > 0) cuda::check_result(test_driver().cuMemcpyDtoH(host.data(), pointer_, bytes_), "cuMemcpyDtoH");
    return host;
  }

  /// Whether nothing wrote past the end of memory that was filled with 0xff.
  bool guard_is_intact() const {
    std::vector<unsigned char> band(guard_bytes);
    cuda::check_result(test_driver().cuMemcpyDtoH(band.data(), pointer_ + bytes_, guard_bytes), "cuMemcpyDtoH");
    for (unsigned char b : band) {
      if (b != 0xff) return false;
    }
    return true;
  }

 private:
  static constexpr std::size_t guard_bytes = 4096;

  cuda::ContextGuard guard_;
  DevicePointer pointer_ = 0;
  std::size_t bytes_;
};

/// A dense (batch, seqlen, heads, d) tensor.
inline TensorView dense_view(void* data, DType dtype, Device device, std::array<int64_t, 4> shape) {
  TensorView t;
  t.data = data;
  t.dtype = element_type(dtype);
  t.device = device;
  t.rank = 4;
  t.shape = shape;
  t.strides = {shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1};
  return t;
}

}  // namespace flashcute::testing
