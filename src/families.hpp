// The families of src/kernels.def as data.
#pragma once

#include <string_view>
#include <vector>

#include "flashcute/config.hpp"

namespace flashcute {

struct ForwardFamily {
  std::string_view name;
  ForwardConfig config;  // with any of `family_dtypes`
};

inline constexpr DType family_dtypes[] = {DType::float16, DType::bfloat16};
inline constexpr MaskKind family_masks[] = {MaskKind::full, MaskKind::causal};

inline constexpr ForwardFamily forward_families[] = {
#define FLASHCUTE_FORWARD_FAMILY(name, config) {#name, config},
#include "kernels.def"
#undef FLASHCUTE_FORWARD_FAMILY
};

inline std::vector<ForwardKernelId> kernels_of(ForwardFamily const& family) {
  std::vector<ForwardKernelId> kernels;
  for (DType dtype : family_dtypes) {
    for (MaskKind mask : family_masks) {
      ForwardConfig config = family.config;
      config.dtype = dtype;
      kernels.push_back({config, {mask}});
    }
  }
  return kernels;
}

}  // namespace flashcute
