// The families of src/image/kernels.def as data.
#pragma once

#include <algorithm>
#include <array>
#include <span>
#include <string_view>
#include <type_traits>
#include <vector>

#include "flashcute/core/block_map_kernel.hpp"
#include "flashcute/core/defaults.hpp"

namespace flashcute {

/// The default features of `prebuild`.
inline constexpr Features full_and_causal[] = {{.mask = MaskKind::full}, {.mask = MaskKind::causal}};
inline constexpr Features every_mask[] = {
    {.mask = MaskKind::full}, {.mask = MaskKind::causal}, {.mask = MaskKind::band}, {.mask = MaskKind::mapped}};

/// The features of a family's kernels; those with other features are compiled at their first use. More of them for
/// bfloat16 alone keep the time of a build, and its size, in bounds.
struct FamilyFeatures {
  std::span<Features const> bfloat16, others;

  constexpr std::span<Features const> of(DType dtype) const { return dtype == DType::bfloat16 ? bfloat16 : others; }
};
inline constexpr FamilyFeatures plain_bfloat16{full_and_causal, {}};
inline constexpr FamilyFeatures plain{full_and_causal, full_and_causal};
inline constexpr FamilyFeatures with_all_masks{every_mask, full_and_causal};

template <class Config>
struct Family {
  std::string_view name;
  Config config;  // stands for the dtypes of the same size too
  FamilyFeatures features;
};

inline constexpr Family<ForwardConfig> forward_families[] = {
#define FLASHCUTE_FORWARD_FAMILY(name, config, features) {#name, config, features},
#include "image/kernels.def"
};

inline constexpr Family<BackwardConfig> backward_families[] = {
#define FLASHCUTE_BACKWARD_FAMILY(name, config, features) {#name, config, features},
#include "image/kernels.def"
};

/// The family of the one kernel that makes block maps.
struct BlockMapFamily {
  std::string_view name;
};
inline constexpr BlockMapFamily block_map_families[] = {
#define FLASHCUTE_BLOCK_MAP_FAMILY(name) {#name},
#include "image/kernels.def"
};

inline std::vector<BlockMapKernelId> kernels_of(BlockMapFamily const&) { return {BlockMapKernelId{}}; }

/// The family's configurations: one for each dtype that it has kernels for.
template <class Config>
std::vector<Config> configs_of(Family<Config> const& family) {
  std::vector<Config> all;
  for (DType dtype : {DType::float16, DType::bfloat16, DType::float32}) {
    if (size_of(dtype) != size_of(family.config.dtype) || family.features.of(dtype).empty()) continue;
    all.push_back(family.config);
    all.back().dtype = dtype;
  }
  return all;
}

constexpr std::array<SinglePass, 1> passes_of(ForwardConfig const&) { return {}; }

constexpr bool serves(ForwardConfig const&, MaskKind) { return true; }

/// The kernels of a configuration for each of the features that it serves, of all passes; for gradients that of sinks
/// too, where there may be any.
template <class Config>
std::vector<KernelId<Config>> kernels_of(Config const& config, std::span<Features const> features) {
  std::vector<KernelId<Config>> kernels;
  auto const add = [&](auto pass, Features const& each) {
    KernelId<Config> const kernel = kernel_of(config, pass, each);
    // Features that differ only in what the pass does not read share one kernel.
    if (std::find(kernels.begin(), kernels.end(), kernel) == kernels.end()) kernels.push_back(kernel);
  };
  for (auto const pass : passes_of(config)) {
    for (Features const& each : features) {
      if (serves(config, each.mask)) add(pass, each);
    }
  }
  if constexpr (std::is_same_v<Config, BackwardConfig>) {
    for (Features const& each : features) {
      if (takes_sink(each.mask) && serves(config, each.mask)) add(BackwardPass::sink, each);
    }
  }
  return kernels;
}

template <class Config>
std::vector<KernelId<Config>> kernels_of(Family<Config> const& family) {
  std::vector<KernelId<Config>> kernels;
  for (Config const& config : configs_of(family)) {
    for (auto const& kernel : kernels_of(config, family.features.of(config.dtype))) kernels.push_back(kernel);
  }
  return kernels;
}

}  // namespace flashcute
