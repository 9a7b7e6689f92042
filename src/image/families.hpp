// The families of src/image/kernels.def as data.
#pragma once

#include <algorithm>
#include <string_view>
#include <vector>

#include "flashcute/core/defaults.hpp"

namespace flashcute {

template <class Config>
struct Family {
  std::string_view name;
  Config config;  // with any of the dtypes of its size
};

/// What the kernels of the families compute. Kernels with other features are compiled when they are first used.
inline constexpr Features family_features[] = {{.mask = MaskKind::full}, {.mask = MaskKind::causal}};

inline constexpr Family<ForwardConfig> forward_families[] = {
#define FLASHCUTE_FORWARD_FAMILY(name, config) {#name, config},
#include "image/kernels.def"
};

inline constexpr Family<BackwardConfig> backward_families[] = {
#define FLASHCUTE_BACKWARD_FAMILY(name, config) {#name, config},
#include "image/kernels.def"
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

/// The kernels of a configuration that a family holds.
inline std::vector<ForwardKernelId> kernels_of(ForwardConfig const& config) {
  std::vector<ForwardKernelId> kernels;
  for (Features const& features : family_features) kernels.push_back(kernel_of(config, features));
  return kernels;
}

inline std::vector<BackwardKernelId> kernels_of(BackwardConfig const& config) {
  std::vector<BackwardKernelId> kernels;
  for (BackwardPass const pass : passes_of(config)) {
    for (Features const& features : family_features) {
      BackwardKernelId const kernel = kernel_of(config, pass, features);
      // A pass that reads none of the features has one kernel for all.
      if (std::find(kernels.begin(), kernels.end(), kernel) == kernels.end()) kernels.push_back(kernel);
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
