#include "image_store.hpp"

#include <algorithm>
#include <cstdlib>
#include <utility>
#include <vector>

#include "embedded_images.hpp"
#include "environment.hpp"
#include "jit.hpp"
#include "nvrtc.hpp"
#include "source.hpp"

namespace flashcute {
namespace {

/// Every kernel of the families, with its family.
template <class KernelId, class Config, std::size_t n>
auto kernels_among(Family<Config> const (&families)[n]) {
  std::vector<std::pair<KernelId, Family<Config> const*>> all;
  for (auto const& family : families) {
    for (KernelId const& kernel : kernels_of(family)) all.emplace_back(kernel, &family);
  }
  return all;
}

/// The family that holds the kernel, or null. Kernels are compared by their ids: to spell their names would cost more
/// than all else here.
template <class KernelId, class Config, std::size_t n>
Family<Config> const* family_among(Family<Config> const (&families)[n], KernelId const& kernel) {
  static auto const kernels = kernels_among<KernelId>(families);
  auto const found =
      std::find_if(kernels.begin(), kernels.end(), [&](auto const& held) { return held.first == kernel; });
  return found == kernels.end() ? nullptr : found->second;
}
auto family_of(ForwardKernelId const& kernel) { return family_among(forward_families, kernel); }
auto family_of(BackwardKernelId const& kernel) { return family_among(backward_families, kernel); }

/// The image that may be taken for `arch`: empty if there is none, or FLASHCUTE_JIT forbids to take it.
template <class KernelId>
std::string_view embedded_image_for(KernelId const& kernel, Arch arch) {
  if (jit_mode() == JitMode::force || !targets_serve(embedded_targets(), arch)) return {};
  auto const* const family = family_of(kernel);
  return family == nullptr ? std::string_view{} : embedded_image(*family);
}

/// Why embedded_image_for has none.
std::string embedded_problem(ForwardKernelId const& kernel) {
  if (jit_mode() == JitMode::force) return "FLASHCUTE_JIT=force";
  if (embedded_targets().empty()) return "flashcute was built without images";
  return family_of(kernel) != nullptr ? "the build has no image of it for this GPU"
                                      : "it is not among the kernels that are compiled ahead of time";
}

/// "13.0.88" -> 13000
int cuda_version_of(std::string_view version) {
  auto const dot = version.find('.');
  int const major = std::atoi(std::string(version.substr(0, dot)).c_str());
  int const minor = dot == std::string_view::npos ? 0 : std::atoi(std::string(version.substr(dot + 1)).c_str());
  return 1000 * major + 10 * minor;
}

template <class KernelId>
Image image_of(KernelId const& kernel, Arch arch) {
  if (std::string_view const embedded = embedded_image_for(kernel, arch); !embedded.empty()) {
    return {embedded, {}, "ahead of time", cuda_version_of(embedded_compiler_version())};
  }
  JitImage image = jit_image(code_of(kernel, arch), arch);
  return {{},
          std::move(image.bytes),
          image.compiled ? "compiled by NVRTC " + nvrtc_version() : "disk cache",
          cuda_version_of(nvrtc_version())};
}

}  // namespace

bool targets_serve(std::string_view targets, Arch arch) {
  while (!targets.empty()) {
    auto const end = targets.find(' ');
    std::string_view const target = targets.substr(0, end);
    targets = end == std::string_view::npos ? std::string_view{} : targets.substr(end + 1);
    int const number = std::atoi(std::string(target).c_str());
    bool const ptx = target.ends_with("-ptx");
    if (number <= arch && (ptx || number / 10 == arch / 10)) return true;
  }
  return false;
}

std::string_view image_archs() { return embedded_targets(); }

std::string_view image_compiler() {
  static std::string const compiler =
      embedded_compiler_version().empty() ? "" : "nvcc " + std::string(embedded_compiler_version());
  return compiler;
}

Image find_image(ForwardKernelId const& kernel, Arch arch) { return image_of(kernel, arch); }
Image find_image(BackwardKernelId const& kernel, Arch arch) { return image_of(kernel, arch); }

ImageSource image_source(ForwardKernelId const& kernel, Arch arch) {
  if (!embedded_image_for(kernel, arch).empty()) return ImageSource::library;
  return can_compile(arch) ? ImageSource::compiler : ImageSource::none;
}

std::string image_problem(ForwardKernelId const& kernel, Arch arch) {
  return embedded_problem(kernel) + ", and " + compile_problem(arch);
}

std::string image_origin(ForwardKernelId const& kernel, Arch arch) {
  switch (image_source(kernel, arch)) {
    case ImageSource::library: return "ahead of time";
    case ImageSource::compiler: return "run-time compilation, once (" + embedded_problem(kernel) + ")";
    case ImageSource::none: break;
  }
  return "none: " + image_problem(kernel, arch);
}

}  // namespace flashcute
