#include "image/embedded_images.hpp"

#include <iterator>

// The build defines FLASHCUTE_WITH_IMAGES, FLASHCUTE_IMAGE_ARCHS ("80 90 80-ptx") and
// FLASHCUTE_NVCC_VERSION ("13.0.88"), and assembles each family's image between two symbols.
#if FLASHCUTE_WITH_IMAGES
#define FLASHCUTE_DECLARE(name, ...) extern "C" char const flashcute_image_##name[], flashcute_image_##name##_end[];
#define FLASHCUTE_FORWARD_FAMILY FLASHCUTE_DECLARE
#define FLASHCUTE_BACKWARD_FAMILY FLASHCUTE_DECLARE
#define FLASHCUTE_BLOCK_MAP_FAMILY FLASHCUTE_DECLARE
#include "image/kernels.def"
#undef FLASHCUTE_DECLARE
#else
#define FLASHCUTE_IMAGE_ARCHS ""
#define FLASHCUTE_NVCC_VERSION ""
#endif

namespace flashcute {

#if FLASHCUTE_WITH_IMAGES
namespace {

struct Image {
  char const* begin;
  char const* end;
};

#define FLASHCUTE_IMAGE(name, ...) {flashcute_image_##name, flashcute_image_##name##_end},
constexpr Image forward_images[] = {
#define FLASHCUTE_FORWARD_FAMILY FLASHCUTE_IMAGE
#include "image/kernels.def"
};
constexpr Image backward_images[] = {
#define FLASHCUTE_BACKWARD_FAMILY FLASHCUTE_IMAGE
#include "image/kernels.def"
};
constexpr Image block_map_images[] = {
#define FLASHCUTE_BLOCK_MAP_FAMILY FLASHCUTE_IMAGE
#include "image/kernels.def"
};
#undef FLASHCUTE_IMAGE

std::string_view bytes(Image const& image) { return {image.begin, static_cast<std::size_t>(image.end - image.begin)}; }

}  // namespace

std::string_view embedded_image(Family<ForwardConfig> const& family) {
  return bytes(forward_images[&family - std::begin(forward_families)]);
}
std::string_view embedded_image(Family<BackwardConfig> const& family) {
  return bytes(backward_images[&family - std::begin(backward_families)]);
}
std::string_view embedded_image(BlockMapFamily const& family) {
  return bytes(block_map_images[&family - std::begin(block_map_families)]);
}
#else
std::string_view embedded_image(BlockMapFamily const&) { return {}; }
std::string_view embedded_image(Family<ForwardConfig> const&) { return {}; }
std::string_view embedded_image(Family<BackwardConfig> const&) { return {}; }
#endif

std::string_view embedded_targets() { return FLASHCUTE_IMAGE_ARCHS; }

std::string_view embedded_compiler_version() { return FLASHCUTE_NVCC_VERSION; }

}  // namespace flashcute
