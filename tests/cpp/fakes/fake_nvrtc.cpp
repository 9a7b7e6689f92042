// A libnvrtc.so that compiles nothing, and takes no time for it unless the source says "sleep": what comes back only
// begins like an image, and then has the source. It refuses a source that says "#error". With the fake driver, kernels
// that are not compiled ahead of time can be launched.
#include <chrono>
#include <cstddef>
#include <string>
#include <thread>

namespace {

/// As large as a real one.
std::string image_of(void* program) {
  std::string image = std::string("\x7f") + "ELF" + *static_cast<std::string*>(program);
  image.resize(1 << 20);
  return image;
}

bool says(void* program, char const* word) {
  return static_cast<std::string*>(program)->find(word) != std::string::npos;
}

}  // namespace

extern "C" {

int nvrtcVersion(int* major, int* minor) { return *major = 13, *minor = 0; }
char const* nvrtcGetErrorString(int) { return "a fake failure"; }
int nvrtcGetNumSupportedArchs(int* count) { return *count = 3, 0; }
int nvrtcGetSupportedArchs(int* archs) { return archs[0] = 80, archs[1] = 90, archs[2] = 100, 0; }

int nvrtcCreateProgram(void** program, char const* source, char const*, int, char const* const*, char const* const*) {
  return *program = new std::string(source), 0;
}
int nvrtcDestroyProgram(void** program) { return delete static_cast<std::string*>(*program), 0; }
int nvrtcCompileProgram(void* program, int, char const* const*) {
  if (says(program, "sleep")) std::this_thread::sleep_for(std::chrono::minutes(10));
  return says(program, "#error") ? 6 : 0;
}

int nvrtcGetProgramLogSize(void*, std::size_t* size) { return *size = 0, 0; }
int nvrtcGetProgramLog(void*, char*) { return 0; }
int nvrtcGetCUBINSize(void* program, std::size_t* size) { return *size = image_of(program).size(), 0; }
int nvrtcGetCUBIN(void* program, char* bytes) { return image_of(program).copy(bytes, 1 << 20), 0; }
int nvrtcGetPTXSize(void*, std::size_t* size) { return *size = 0, 0; }
int nvrtcGetPTX(void*, char*) { return 0; }

}  // extern "C"
