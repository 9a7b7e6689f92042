// The images that the build put into the library, one for each family of kernels.def. Tests that need other images
// define these functions themselves.
#pragma once

#include <string_view>

#include "image/families.hpp"

namespace flashcute {

/// The targets of the images: "80 90 100 120 80-ptx"; "" in a library without images.
std::string_view embedded_targets();

/// The version of the nvcc that made them: "13.0.88"; "" in a library without images.
std::string_view embedded_compiler_version();

/// The image of a family, which is an element of forward_families, backward_families or block_map_families. Empty if
/// the build has no target that the family's kernels run on.
std::string_view embedded_image(Family<ForwardConfig> const& family);
std::string_view embedded_image(Family<BackwardConfig> const& family);
std::string_view embedded_image(BlockMapFamily const& family);

}  // namespace flashcute
