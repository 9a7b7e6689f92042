#include "source.hpp"

namespace flashcute {
namespace {

// One overload per type of option: an option of a new type does not compile until it can be spelled here.
std::string literal(bool value) { return value ? "true" : "false"; }
std::string literal(int32_t value) { return std::to_string(value); }
std::string literal(DType value) { return std::string("flashcute::DType::") + name_of(value); }
std::string literal(Math value) { return std::string("flashcute::Math::") + name_of(value); }
std::string literal(MaskKind value) { return std::string("flashcute::MaskKind::") + name_of(value); }

/// The kernel as a C++ expression. Every option is spelled, defaults too: the text alone says what is compiled.
std::string expression(ForwardKernelId const& kernel) {
  std::string options;
  for_each_option(kernel.config, [&](char const* option, auto value) {
    options += (options.empty() ? "." : ", .") + std::string(option) + " = " + literal(value);
  });
  return "flashcute::ForwardKernelId{.config = {" + options +
         "}, .features = {.mask = " + literal(kernel.features.mask) +
         ", .count_blocks = " + literal(kernel.features.count_blocks) + "}}";
}

}  // namespace

std::string generated_source(std::span<ForwardKernelId const> kernels) {
  std::string text = "#include \"flashcute/entry.hpp\"\n\n";
  for (ForwardKernelId const& kernel : kernels) {
    text += std::string("FLASHCUTE_FORWARD_ENTRY(") + name(kernel).text + ",\n    " + expression(kernel) + ")\n";
  }
  return text;
}

KernelCode code_of(ForwardKernelId const& kernel, Arch arch) {
  std::string const target = target_of(arch);
  if (ForwardConfigError const e = check(kernel.config, arch); e != ForwardConfigError::none) {
    throw ConfigError(std::string(name(kernel.config).text) + " for " + target + ": " + sentence(e));
  }
  return {name(kernel).text, generated_source(std::span(&kernel, 1))};
}

}  // namespace flashcute
