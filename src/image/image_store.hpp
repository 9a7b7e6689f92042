// Where kernel images come from: compiled ahead of time into the library, else the disk cache, else NVRTC.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "flashcute/core/backward_config.hpp"
#include "flashcute/core/block_map_kernel.hpp"

namespace flashcute {

struct Image {
  std::string_view bytes;  // cubin or fatbin; lives as long as the library, or in `storage`
  std::string storage;     // owns what was read or compiled
  std::string origin;      // "ahead of time", "disk cache", "compiled by NVRTC 13.0"
  int cuda_version;        // of the compiler that made it, 13000 for 13.0

  std::string_view view() const { return storage.empty() ? bytes : std::string_view(storage); }
};

using AnyKernelId = std::variant<ForwardKernelId, BackwardKernelId, BlockMapKernelId>;

/// The images that hold the kernels for `arch`, in their order. Those that are neither in the library nor in the disk
/// cache are compiled, at the same time. Throws UnsupportedError or CompileError if an image does not exist and cannot
/// be made.
std::vector<Image> find_images(std::span<AnyKernelId const> kernels, Arch arch);

/// Whether find_images would compile it.
bool needs_compiler(AnyKernelId const& kernel, Arch arch);

/// Where find_images would get an image, in order of how long a first call waits for it.
enum class ImageSource : std::uint8_t {
  none,        // from nowhere: find_images throws
  compiler,    // it is compiled
  ptx,         // the library has PTX of it, which the driver compiles while it loads
  disk_cache,  // it was compiled before: by this process, or before this process first looked
  library,     // compiled ahead of time
};

/// Cheap enough for every call; reads the environment in each. Does not see what another process compiles meanwhile, so
/// that a process does not change its choices on its own. This and the next two take both kinds of ids.
template <class KernelId>
ImageSource image_source(KernelId const& kernel, Arch arch);

/// Why there is no image where image_source says so: "the build has no image of it for this GPU, and ...".
template <class KernelId>
std::string image_problem(KernelId const& kernel, Arch arch);

/// image_source in words: "ahead of time", "disk cache", "run-time compilation, once (...)", "none: ...".
template <class KernelId>
std::string image_origin(KernelId const& kernel, Arch arch);

/// How an image for `targets` ("80 90 80-ptx") serves `arch`: by machine code (`library`), which runs on GPUs of the
/// same major and the same or a later minor compute capability; by PTX, which runs on the same or any later one; or not
/// at all.
ImageSource source_among(std::string_view targets, Arch arch);

/// What the build put into the library.
std::string_view image_archs();     // "80 90 100 120 80-ptx"; empty without images
std::string_view image_compiler();  // "nvcc 13.0.88"; empty without images

}  // namespace flashcute
