#include "launch/driver.hpp"

#include <deque>
#include <mutex>
#include <type_traits>

#include "system/shared_library.hpp"

namespace flashcute::cuda {
namespace {

constexpr int attribute_multiprocessors = 16;
constexpr int attribute_capability_major = 75;
constexpr int attribute_capability_minor = 76;

constexpr char const* cpu_hint = "CPU tensors run without a GPU";

using GetProcAddress = Result (*)(char const*, void**, int, std::uint64_t, int*);

GetProcAddress find_get_proc_address() {
  std::string problems;
  auto const library = SharedLibrary::open({"libcuda.so.1"}, &problems);
  if (!library)
    throw DeviceError("no CUDA driver: libcuda.so.1 could not be opened (" + problems.substr(0, problems.find('\n')) +
                      "); " + cpu_hint);
  auto const get = library->find<GetProcAddress>("cuGetProcAddress_v2");
  if (get == nullptr) {
    throw DeviceError(std::string("the CUDA driver is too old: flashcute needs one for CUDA 12.0 or later (525); ") +
                      cpu_hint);
  }
  return get;
}

Driver open_driver() {
  Driver d;
  auto const load = [&](char const* name, int version, auto& function) {
    void* const address = driver_function(name, version);
    if (address == nullptr) {
      throw DeviceError(std::string("the CUDA driver is too old: it has no ") + name +
                        "; flashcute needs one for CUDA 12.0 or later (525); " + cpu_hint);
    }
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(address);
  };
#define FLASHCUTE_LOAD(name, version, parameters) load(#name, version, d.name);
  FLASHCUTE_DRIVER_FUNCTIONS(FLASHCUTE_LOAD)
#undef FLASHCUTE_LOAD

  if (Result const result = d.cuInit(0); result != success) {
    char const* name = "?";
    d.cuGetErrorName(result, &name);
    throw DeviceError(std::string("the CUDA driver did not initialise: cuInit returned ") + name +
                      " (is there a GPU, and was CUDA unused before this process forked?); " + cpu_hint);
  }
  d.cuDriverGetVersion(&d.version);
  d.cuDeviceGetCount(&d.devices);
  return d;
}

std::string version_text(int cuda_version) {
  return std::to_string(cuda_version / 1000) + "." + std::to_string(cuda_version % 1000 / 10);
}

}  // namespace

void* driver_function(char const* name, int version) {
  static GetProcAddress const get = find_get_proc_address();  // after a throw the next call tries again
  void* address = nullptr;
  int status = 0;
  return get(name, &address, version, 0, &status) == success ? address : nullptr;
}

Driver const& driver() {
  static Driver const d = open_driver();  // after a throw the next call tries again
  return d;
}

void check_result(Result result, std::string const& what) {
  if (result == success) return;
  char const* name = "an unknown error";
  char const* text = "";
  driver().cuGetErrorName(result, &name);
  driver().cuGetErrorString(result, &text);
  throw DriverError(what + ": " + name + " (" + text + ")");
}

namespace {

DeviceHandle device_handle(int ordinal) {
  if (ordinal < 0 || ordinal >= driver().devices) {
    throw DeviceError("cuda:" + std::to_string(ordinal) + " does not exist: the driver sees " +
                      std::to_string(driver().devices) + " device(s)");
  }
  DeviceHandle handle = 0;
  check_result(driver().cuDeviceGet(&handle, ordinal), "cuDeviceGet");
  return handle;
}

}  // namespace

Arch device_arch(int ordinal) {
  DeviceHandle const handle = device_handle(ordinal);
  int major = 0, minor = 0;
  check_result(driver().cuDeviceGetAttribute(&major, attribute_capability_major, handle), "cuDeviceGetAttribute");
  check_result(driver().cuDeviceGetAttribute(&minor, attribute_capability_minor, handle), "cuDeviceGetAttribute");
  return 10 * major + minor;
}

std::string device_name(int ordinal) {
  char text[128] = {};
  check_result(driver().cuDeviceGetName(text, sizeof text, device_handle(ordinal)), "cuDeviceGetName");
  return text;
}

DeviceFacts const& device_facts(int ordinal) {
  if (ordinal < 0 || ordinal >= driver().devices) device_handle(ordinal);  // throws
  static std::deque<std::once_flag> once(static_cast<std::size_t>(driver().devices));
  static std::deque<DeviceFacts> facts(static_cast<std::size_t>(driver().devices));
  auto const i = static_cast<std::size_t>(ordinal);
  std::call_once(once[i], [&] {
    RelaxedCapture const relaxed;  // the first call may happen inside a graph capture
    DeviceHandle const handle = device_handle(ordinal);
    Context context = nullptr;
    check_result(driver().cuDevicePrimaryCtxRetain(&context, handle), "cuDevicePrimaryCtxRetain");
    int multiprocessors = 0;
    check_result(driver().cuDeviceGetAttribute(&multiprocessors, attribute_multiprocessors, handle),
                 "cuDeviceGetAttribute");
    facts[i] = {handle, context, device_arch(ordinal), multiprocessors};
  });
  return facts[i];
}

void require_driver_for(int image_cuda_version, int driver_cuda_version) {
  if (driver_cuda_version / 1000 >= image_cuda_version / 1000) return;
  bool const cuda13 = image_cuda_version / 1000 == 13;
  throw DeviceError("the CUDA driver is too old for the kernel images: they were compiled by CUDA " +
                    version_text(image_cuda_version) + ", the driver supports up to CUDA " +
                    version_text(driver_cuda_version) + ". Update the driver" + (cuda13 ? " to 580 or later" : "") +
                    ", or compile at run time with an NVRTC of CUDA " + std::to_string(driver_cuda_version / 1000) +
                    " and FLASHCUTE_JIT=force");
}

ContextGuard::ContextGuard(Context context) {
  Context current = nullptr;
  check_result(driver().cuCtxGetCurrent(&current), "cuCtxGetCurrent");
  if (current == context) return;
  check_result(driver().cuCtxPushCurrent(context), "cuCtxPushCurrent");
  pushed_ = true;
}

ContextGuard::~ContextGuard() {
  Context popped = nullptr;
  if (pushed_) driver().cuCtxPopCurrent(&popped);
}

RelaxedCapture::RelaxedCapture() {
  check_result(driver().cuThreadExchangeStreamCaptureMode(&mode_), "cuThreadExchangeStreamCaptureMode");
}

RelaxedCapture::~RelaxedCapture() { driver().cuThreadExchangeStreamCaptureMode(&mode_); }

}  // namespace flashcute::cuda
