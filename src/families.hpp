// The families of src/kernels.def as data.
#pragma once

#include <string_view>
#include <vector>

#include "flashcute/tiles.hpp"

namespace flashcute {

template <class Config>
struct Family {
  std::string_view name;
  Config config;  // with any of the dtypes of its size
};

inline constexpr MaskKind family_masks[] = {MaskKind::full, MaskKind::causal};

inline constexpr Family<ForwardConfig> forward_families[] = {
#define FLASHCUTE_FORWARD_FAMILY(name, config) {#name, config},
#include "kernels.def"
};

inline constexpr Family<BackwardConfig> backward_families[] = {
#define FLASHCUTE_BACKWARD_FAMILY(name, config) {#name, config},
#include "kernels.def"
};

/// The family's configurations: one for each dtype.
template <class Config>
std::vector<Config> configs_of(Family<Config> const& family) {
  std::vector<Config> all;
  for (DType dtype : {DType::float16, DType::bfloat16, DType::float32}) {
    if (size_of(dtype) != size_of(family.config.dtype)) continue;
    all.push_back(family.config);
    all.back().dtype = dtype;
  }
  return all;
}

/// A configuration's kernels for all masks.
inline std::vector<ForwardKernelId> kernels_of(ForwardConfig const& config) {
  std::vector<ForwardKernelId> kernels;
  for (MaskKind mask : family_masks) kernels.push_back({config, {mask}});
  return kernels;
}

inline std::vector<BackwardKernelId> kernels_of(BackwardConfig const& config) {
  std::vector<BackwardKernelId> kernels;
  for (BackwardPass const pass : passes_of(config)) {
    for (MaskKind mask : family_masks) {
      BackwardKernelId const kernel = kernel_of(config, pass, mask);
      if (kernels.empty() || kernels.back() != kernel) kernels.push_back(kernel);  // some serve every mask
    }
  }
  return kernels;
}

template <class Config>
auto kernels_of(Family<Config> const& family) {
  decltype(kernels_of(family.config)) kernels;
  for (Config const& config : configs_of(family)) {
    for (auto const& kernel : kernels_of(config)) kernels.push_back(kernel);
  }
  return kernels;
}

}  // namespace flashcute
