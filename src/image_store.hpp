// Where kernel images come from: compiled ahead of time into the library, else the disk cache, else NVRTC.
#pragma once

#include <string>
#include <string_view>

#include "flashcute/config.hpp"
#include "kernel_code.hpp"

namespace flashcute {

struct Image {
  std::string_view bytes;  // cubin or fatbin; lives as long as the library, or in `storage`
  std::string storage;     // owns what was read or compiled
  std::string origin;      // "ahead of time", "disk cache", "compiled by NVRTC 13.0"
  int cuda_version;        // of the compiler that made it, 13000 for 13.0

  std::string_view view() const { return storage.empty() ? bytes : std::string_view(storage); }
};

/// The image that holds `kernel` for `arch`. Throws UnsupportedError or CompileError if there is none and
/// none can be made.
Image find_image(KernelCode const& kernel, Arch arch);

/// Where find_image would take it from, without making it: "ahead of time", "run-time compilation (...)",
/// or why there is none.
std::string image_origin(KernelCode const& kernel, Arch arch);

/// Whether an image assembled for `targets` ("80 90 80-ptx") runs on `arch`: machine code runs within its
/// major version from its minor version on, PTX on everything from its version on.
bool targets_serve(std::string_view targets, Arch arch);

/// What the build put into the library.
std::string_view image_archs();     // "80 90 100 120 80-ptx"; empty without images
std::string_view image_compiler();  // "nvcc 13.0.88"; empty without images

}  // namespace flashcute
