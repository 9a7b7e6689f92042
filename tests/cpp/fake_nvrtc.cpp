// A libnvrtc.so that compiles nothing, and takes no time for it: what comes back only begins like an image. With the
// fake driver, kernels that are not compiled ahead of time can be launched.
#include <cstddef>
#include <string>

namespace {

std::string const& image() {
  static std::string const bytes = std::string("\x7f") + "ELF" + std::string(1 << 20, '\0');  // as large as a real one
  return bytes;
}

}  // namespace

extern "C" {

int nvrtcVersion(int* major, int* minor) { return *major = 13, *minor = 0; }
char const* nvrtcGetErrorString(int) { return "a fake failure"; }
int nvrtcGetNumSupportedArchs(int* count) { return *count = 3, 0; }
int nvrtcGetSupportedArchs(int* archs) { return archs[0] = 80, archs[1] = 90, archs[2] = 100, 0; }

int nvrtcCreateProgram(void** program, char const*, char const*, int, char const* const*, char const* const*) {
  return *program = nullptr, 0;
}
int nvrtcDestroyProgram(void**) { return 0; }
int nvrtcCompileProgram(void*, int, char const* const*) { return 0; }

int nvrtcGetProgramLogSize(void*, std::size_t* size) { return *size = 0, 0; }
int nvrtcGetProgramLog(void*, char*) { return 0; }
int nvrtcGetCUBINSize(void*, std::size_t* size) { return *size = image().size(), 0; }
int nvrtcGetCUBIN(void*, char* bytes) { return image().copy(bytes, image().size()), 0; }
int nvrtcGetPTXSize(void*, std::size_t* size) { return *size = 0, 0; }
int nvrtcGetPTX(void*, char*) { return 0; }

}  // extern "C"
