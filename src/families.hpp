// The families of src/kernels.def as data.
#pragma once

#include <string_view>
#include <vector>

#include "flashcute/tiles.hpp"

namespace flashcute {

struct ForwardFamily {
  std::string_view name;
  ForwardConfig config;  // with any of the dtypes of its size
};

inline constexpr MaskKind family_masks[] = {MaskKind::full, MaskKind::causal};

inline constexpr ForwardFamily forward_families[] = {
#define FLASHCUTE_FORWARD_FAMILY(name, config) {#name, config},
#include "kernels.def"
#undef FLASHCUTE_FORWARD_FAMILY
};

/// The family's configurations: one for each dtype.
inline std::vector<ForwardConfig> configs_of(ForwardFamily const& family) {
  std::vector<ForwardConfig> all;
  for (DType dtype : {DType::float16, DType::bfloat16, DType::float32}) {
    if (size_of(dtype) != size_of(family.config.dtype)) continue;
    all.push_back(family.config);
    all.back().dtype = dtype;
  }
  return all;
}

inline std::vector<ForwardKernelId> kernels_of(ForwardFamily const& family) {
  std::vector<ForwardKernelId> kernels;
  for (ForwardConfig const& config : configs_of(family)) {
    for (MaskKind mask : family_masks) kernels.push_back({config, {mask}});
  }
  return kernels;
}

}  // namespace flashcute
