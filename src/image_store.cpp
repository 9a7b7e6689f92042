#include "image_store.hpp"

#include <cstdlib>

#include "environment.hpp"
#include "families.hpp"
#include "jit.hpp"
#include "nvrtc.hpp"

// The build defines FLASHCUTE_WITH_IMAGES, FLASHCUTE_IMAGE_ARCHS ("80 90 80-ptx") and
// FLASHCUTE_NVCC_VERSION ("13.0.88"), and assembles each family's image between two symbols.
#if FLASHCUTE_WITH_IMAGES
#define FLASHCUTE_DECLARE(name, config) extern "C" char const flashcute_image_##name[], flashcute_image_##name##_end[];
#define FLASHCUTE_FORWARD_FAMILY FLASHCUTE_DECLARE
#define FLASHCUTE_BACKWARD_FAMILY FLASHCUTE_DECLARE
#include "kernels.def"
#undef FLASHCUTE_DECLARE
#else
#define FLASHCUTE_IMAGE_ARCHS ""
#define FLASHCUTE_NVCC_VERSION ""
#endif

namespace flashcute {
namespace {

struct EmbeddedImage {
  char const* begin;
  char const* end;
};

#if FLASHCUTE_WITH_IMAGES
#define FLASHCUTE_IMAGE(name, config) {flashcute_image_##name, flashcute_image_##name##_end},
constexpr EmbeddedImage forward_images[] = {
#define FLASHCUTE_FORWARD_FAMILY FLASHCUTE_IMAGE
#include "kernels.def"
};
constexpr EmbeddedImage backward_images[] = {
#define FLASHCUTE_BACKWARD_FAMILY FLASHCUTE_IMAGE
#include "kernels.def"
};
#undef FLASHCUTE_IMAGE

/// The image of the first of the families that holds the kernel.
template <class Families>
std::optional<EmbeddedImage> image_among(Families const& families, EmbeddedImage const* images,
                                         std::string const& kernel) {
  for (auto const& family : families) {
    for (auto const& held : kernels_of(family)) {
      if (name(held).text != kernel) continue;
      EmbeddedImage const& image = images[&family - std::begin(families)];
      if (image.begin != image.end) return image;  // else none of its targets was built for
    }
  }
  return std::nullopt;
}
#endif

std::optional<EmbeddedImage> embedded_image([[maybe_unused]] KernelCode const& kernel) {
#if FLASHCUTE_WITH_IMAGES
  if (auto const image = image_among(forward_families, forward_images, kernel.name)) return image;
  return image_among(backward_families, backward_images, kernel.name);
#else
  return std::nullopt;
#endif
}

/// "13.0.88" -> 13000
int cuda_version_of(std::string_view version) {
  auto const dot = version.find('.');
  int const major = std::atoi(std::string(version.substr(0, dot)).c_str());
  int const minor = dot == std::string_view::npos ? 0 : std::atoi(std::string(version.substr(dot + 1)).c_str());
  return 1000 * major + 10 * minor;
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

std::string_view image_archs() { return FLASHCUTE_IMAGE_ARCHS; }

std::string_view image_compiler() {
  return std::string_view(FLASHCUTE_NVCC_VERSION).empty() ? "" : "nvcc " FLASHCUTE_NVCC_VERSION;
}

Image find_image(KernelCode const& kernel, Arch arch) {
  if (jit_mode() != JitMode::force && targets_serve(image_archs(), arch)) {
    if (auto const embedded = embedded_image(kernel)) {
      return {{embedded->begin, static_cast<std::size_t>(embedded->end - embedded->begin)},
              {},
              "ahead of time",
              cuda_version_of(FLASHCUTE_NVCC_VERSION)};
    }
  }
  JitImage image = jit_image(kernel, arch);
  return {{},
          std::move(image.bytes),
          image.compiled ? "compiled by NVRTC " + nvrtc_version() : "disk cache",
          cuda_version_of(nvrtc_version())};
}

std::string image_origin(KernelCode const& kernel, Arch arch) {
  bool const forced = jit_mode() == JitMode::force;
  if (!forced && targets_serve(image_archs(), arch) && embedded_image(kernel)) return "ahead of time";
  std::string const why = forced                    ? "FLASHCUTE_JIT=force"
                          : image_archs().empty()   ? "built without images"
                          : !embedded_image(kernel) ? "not among the ahead-of-time kernels"
                                                    : "no ahead-of-time image for this GPU";
  if (jit_mode() == JitMode::off) return "none: " + why + ", and FLASHCUTE_JIT=off";
  if (!nvrtc_available()) return "none: " + why + ", and " + nvrtc_problem();
  return "run-time compilation, once (" + why + ")";
}

}  // namespace flashcute
