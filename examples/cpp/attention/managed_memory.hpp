// Memory that the CPU and GPU 0 both see. It is asked for from the driver, which is opened here and not linked, so this
// program needs no CUDA toolkit and also runs where there is no GPU. A program that has cudaMalloc can pass what that
// returns to flashcute just the same.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <stdexcept>
#include <string>

class ManagedMemory {
 public:
  explicit ManagedMemory(std::size_t bytes) {
    make_gpu_0_current();
    unsigned const attach_global = 1;
    call<int(void**, std::size_t, unsigned)>("cuMemAllocManaged", &data_, bytes, attach_global);
  }
  ManagedMemory(ManagedMemory const&) = delete;
  ManagedMemory& operator=(ManagedMemory const&) = delete;
  ~ManagedMemory() { function<int(void*)>("cuMemFree_v2")(data_); }

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

  /// Waits until the GPU has done all that it was given.
  static void synchronize() { call<int()>("cuCtxSynchronize"); }

 private:
  template <class Function>
  static Function* function(char const* name) {
    static void* const driver = dlopen("libcuda.so.1", RTLD_NOW);
    void* const address = driver == nullptr ? nullptr : dlsym(driver, name);
    if (address == nullptr) throw std::runtime_error(std::string("the CUDA driver has no ") + name);
    return reinterpret_cast<Function*>(address);
  }

  template <class Function, class... Arguments>
  static void call(char const* name, Arguments... arguments) {
    int const error = function<Function>(name)(arguments...);
    if (error != 0) throw std::runtime_error(std::string(name) + " failed with error " + std::to_string(error));
  }

  static void make_gpu_0_current() {
    void* context = nullptr;
    call<int(unsigned)>("cuInit", 0u);
    call<int(void**, int)>("cuDevicePrimaryCtxRetain", &context, 0);
    call<int(void*)>("cuCtxSetCurrent", context);
  }

  void* data_ = nullptr;
};
