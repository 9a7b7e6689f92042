#include "fakes/fake_images.hpp"

#include "image/embedded_images.hpp"

namespace flashcute {

testing::FakeImages& testing::fake_images() {
  static FakeImages images;
  return images;
}

namespace {

template <class Family>
std::string_view image_of(Family const& family) {
  return family.name.find(testing::fake_images().without) == std::string_view::npos ? "an image" : "";
}

}  // namespace

std::string_view embedded_targets() { return testing::fake_images().targets; }
std::string_view embedded_compiler_version() { return "13.0.88"; }
std::string_view embedded_image(Family<ForwardConfig> const& family) { return image_of(family); }
std::string_view embedded_image(Family<BackwardConfig> const& family) { return image_of(family); }
std::string_view embedded_image(BlockMapFamily const& family) { return image_of(family); }

}  // namespace flashcute
