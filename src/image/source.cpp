#include "image/source.hpp"

#include <algorithm>
#include <set>

namespace flashcute {
namespace {

// One overload per type: an option or a feature of a new type does not compile until it has a literal here.
std::string literal(bool value) { return value ? "true" : "false"; }
std::string literal(int32_t value) { return std::to_string(value); }
template <TabulatedEnum Enum>
std::string literal(Enum value) {
  return std::string("flashcute::") + EnumTable<Enum>::type + "::" + name_of(value);
}

/// A designated initializer. It lists every member, defaults too, so that the text alone determines what is compiled.
class Initializer {
 public:
  void add(char const* member, auto value) {
    members_ += (members_.empty() ? "." : ", .") + std::string(member) + " = " + literal(value);
  }
  std::string text() const { return "{" + members_ + "}"; }

 private:
  std::string members_;
};

template <class Config>
std::string initializer(Config const& config) {
  Initializer all;
  for_each_option(config, [&](Option const& option, auto value) { all.add(option.name, value); });
  return all.text();
}

std::string initializer(Features const& features) {
  Initializer all;
  for_each_feature(features, [&](Feature const& feature, auto value) { all.add(feature.name, value); });
  return all.text();
}

/// The macro that defines a kernel, the header that has it, and the type of its argument.
struct Entry {
  char const* macro;
  char const* header;
  char const* id;
};
Entry entry_of(ForwardKernelId const& kernel) {
  switch (kernel.config.kernel) {
    case Kernel::sm80: return {"FLASHCUTE_SM80_FORWARD_ENTRY", "flashcute/sm80/entry.hpp", "ForwardKernelId"};
    case Kernel::sm90: return {"FLASHCUTE_SM90_FORWARD_ENTRY", "flashcute/sm90/entry.hpp", "ForwardKernelId"};
  }
  return {};
}
Entry entry_of(BackwardKernelId const& kernel) {
  if (kernel.config.kernel == Kernel::sm80) {
    return {"FLASHCUTE_SM80_BACKWARD_ENTRY", "flashcute/sm80/entry.hpp", "BackwardKernelId"};
  }
  char const* const macro =
      multiplies(kernel.pass) ? "FLASHCUTE_SM90_GRADIENTS_ENTRY" : "FLASHCUTE_SM90_BACKWARD_ENTRY";
  return {macro, "flashcute/sm90/backward_entry.hpp", "BackwardKernelId"};
}

/// The kernel as the C++ line that defines it.
template <class Config>
std::string definition(KernelId<Config> const& kernel) {
  Entry const entry = entry_of(kernel);
  bool const one_pass = EnumTable<typename Config::Pass>::count == 1;
  return std::string(entry.macro) + "(" + name(kernel).text + ",\n    flashcute::" + entry.id +
         "{.config = " + initializer(kernel.config) + (one_pass ? "" : ", .pass = " + literal(kernel.pass)) +
         ", .features = " + initializer(kernel.features) + "})\n";
}

/// Whether CuTe has WGMMA with that many columns only among its extended shapes. (sm90/wgmma_160.hpp has P V's of 160.)
constexpr bool is_extended_wgmma_width(int32_t columns) {
  return columns % 64 != 0 && columns != 8 && columns != 16 && columns != 32 && columns != 96;
}

bool needs_extended_wgmma(ForwardKernelId const& kernel) {
  ForwardConfig const& c = kernel.config;
  return c.kernel == Kernel::sm90 &&
         (is_extended_wgmma_width(c.block_n) || (is_extended_wgmma_width(c.head_dim_v) && c.head_dim_v != 160));
}
bool needs_extended_wgmma(BackwardKernelId const&) { return false; }

template <class KernelId>
std::string source_of(std::span<KernelId const> kernels) {
  std::string text;
  if (std::any_of(kernels.begin(), kernels.end(), [](auto const& k) { return needs_extended_wgmma(k); })) {
    // Parsing these shapes takes longer than all the rest of a compilation.
    text += "#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED\n";
  }
  std::set<std::string> headers;
  for (KernelId const& kernel : kernels) headers.insert(entry_of(kernel).header);
  for (std::string const& header : headers) text += "#include \"" + header + "\"\n";
  text += "\n";
  for (KernelId const& kernel : kernels) text += definition(kernel);
  return text;
}

template <class KernelId>
KernelCode checked_code_of(KernelId const& kernel, Arch arch) {
  std::string const target = target_of(arch);
  if (auto const e = check(kernel.config, arch); e != decltype(e){}) {
    throw ConfigError(std::string(name(kernel.config).text) + " for " + target + ": " + sentence(e));
  }
  return {name(kernel).text, source_of(std::span(&kernel, 1)), kernel.config.kernel == Kernel::sm90};
}

}  // namespace

std::string generated_source(std::span<ForwardKernelId const> kernels) { return source_of(kernels); }
std::string generated_source(std::span<BackwardKernelId const> kernels) { return source_of(kernels); }

std::string generated_source(std::span<BlockMapKernelId const> kernels) {
  std::string text = "#include \"flashcute/device/make_block_map.hpp\"\n\n";
  for (auto const& kernel : kernels) text += std::string("FLASHCUTE_BLOCK_MAP_ENTRY(") + name(kernel).text + ")\n";
  return text;
}

KernelCode code_of(BlockMapKernelId const& kernel, Arch arch) {
  target_of(arch);  // throws for the CPU
  return {name(kernel).text, generated_source(std::span(&kernel, 1))};
}
KernelCode code_of(ForwardKernelId const& kernel, Arch arch) { return checked_code_of(kernel, arch); }
KernelCode code_of(BackwardKernelId const& kernel, Arch arch) { return checked_code_of(kernel, arch); }

}  // namespace flashcute
