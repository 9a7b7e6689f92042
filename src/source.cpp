#include "source.hpp"

#include <algorithm>

namespace flashcute {
namespace {

// One overload per type of option: an option of a new type does not compile until it can be spelled here.
std::string literal(bool value) { return value ? "true" : "false"; }
std::string literal(int32_t value) { return std::to_string(value); }
std::string literal(DType value) { return std::string("flashcute::DType::") + name_of(value); }
std::string literal(Math value) { return std::string("flashcute::Math::") + name_of(value); }
std::string literal(MaskKind value) { return std::string("flashcute::MaskKind::") + name_of(value); }
std::string literal(BackwardPass value) { return std::string("flashcute::BackwardPass::") + name_of(value); }

/// A configuration as an initializer. Every option is spelled, defaults too: the text alone says what is compiled.
template <class Config>
std::string initializer(Config const& config) {
  std::string options;
  for_each_option(config, [&](char const* option, auto value) {
    options += (options.empty() ? "." : ", .") + std::string(option) + " = " + literal(value);
  });
  return "{" + options + "}";
}

std::string initializer(Features const& features) {
  return "{.mask = " + literal(features.mask) + ", .count_blocks = " + literal(features.count_blocks) + "}";
}

/// The kernel as the C++ line that defines it.
std::string definition(ForwardKernelId const& kernel) {
  bool const hopper = kernel.config.math == Math::wgmma;
  return std::string(hopper ? "FLASHCUTE_HOPPER_FORWARD_ENTRY(" : "FLASHCUTE_FORWARD_ENTRY(") + name(kernel).text +
         ",\n    flashcute::ForwardKernelId{.config = " + initializer(kernel.config) +
         ", .features = " + initializer(kernel.features) + "})\n";
}

std::string definition(BackwardKernelId const& kernel) {
  return std::string("FLASHCUTE_BACKWARD_ENTRY(") + name(kernel).text +
         ",\n    flashcute::BackwardKernelId{.config = " + initializer(kernel.config) +
         ", .pass = " + literal(kernel.pass) + ", .features = " + initializer(kernel.features) + "})\n";
}

/// Whether CuTe has WGMMA with that many columns only among its extended shapes.
constexpr bool is_extended_wgmma_width(int32_t columns) {
  return columns % 64 != 0 && columns != 8 && columns != 16 && columns != 32 && columns != 96;
}

bool needs_extended_wgmma(ForwardKernelId const& kernel) {
  return is_extended_wgmma_width(kernel.config.block_n) || is_extended_wgmma_width(kernel.config.head_dim_v);
}
bool needs_extended_wgmma(BackwardKernelId const&) { return false; }

template <class KernelId>
std::string source_of(std::span<KernelId const> kernels) {
  bool const hopper = !kernels.empty() && kernels[0].config.math == Math::wgmma;
  std::string text;
  if (hopper && std::any_of(kernels.begin(), kernels.end(), [](auto const& k) { return needs_extended_wgmma(k); })) {
    // Parsing these shapes takes longer than all the rest of a compilation.
    text += "#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED\n";
  }
  text += hopper ? "#include \"flashcute/sm90/entry.hpp\"\n\n" : "#include \"flashcute/entry.hpp\"\n\n";
  for (KernelId const& kernel : kernels) text += definition(kernel);
  return text;
}

template <class KernelId>
KernelCode checked_code_of(KernelId const& kernel, Arch arch) {
  std::string const target = target_of(arch);
  if (auto const e = check(kernel.config, arch); e != decltype(e){}) {
    throw ConfigError(std::string(name(kernel.config).text) + " for " + target + ": " + sentence(e));
  }
  return {name(kernel).text, source_of(std::span(&kernel, 1)), kernel.config.math == Math::wgmma};
}

}  // namespace

std::string generated_source(std::span<ForwardKernelId const> kernels) { return source_of(kernels); }
std::string generated_source(std::span<BackwardKernelId const> kernels) { return source_of(kernels); }

KernelCode code_of(ForwardKernelId const& kernel, Arch arch) { return checked_code_of(kernel, arch); }
KernelCode code_of(BackwardKernelId const& kernel, Arch arch) { return checked_code_of(kernel, arch); }

}  // namespace flashcute
