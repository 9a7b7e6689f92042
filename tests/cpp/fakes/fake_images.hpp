// A library with other images than the build's: fake_images.cpp takes the place of src/embedded_images.cpp.
#pragma once

#include <string_view>

namespace flashcute::testing {

struct FakeImages {
  std::string_view targets = "80 90 100 80-ptx";
  std::string_view without = "none of them";  // families with this in their names have no image
};

FakeImages& fake_images();

}  // namespace flashcute::testing
