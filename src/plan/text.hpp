// Configurations as text: in messages, in explanations, and as Python's repr.
#pragma once

#include <string>
#include <string_view>
#include <type_traits>

#include "flashcute/core/backward_config.hpp"

namespace flashcute {

inline std::string python_text(bool value) { return value ? "True" : "False"; }
inline std::string python_text(int32_t value) { return std::to_string(value); }
template <class Enum>
  requires std::is_enum_v<Enum>
std::string python_text(Enum value) {
  return std::string("'") + name_of(value) + "'";
}

/// "dtype='bfloat16', head_dim=128, block_m=128, block_n=64, stages=2": the keywords that Python needs to make an equal
/// configuration. The first four are always there; head_dim_v if it differs from head_dim; each other option if its
/// value is not the default, or if `sentence` names it. With `gpu_options` false, only those of the others that
/// `sentence` names, because the CPU ignores them.
template <class Config>
std::string options_text(Config const& config, bool gpu_options = true, std::string_view sentence = {}) {
  std::string text;
  Config::for_each_member([&](Option const& row, auto member) {
    std::string_view const option = row.name;
    bool const always = option == "dtype" || option == "head_dim" || option == "block_m" || option == "block_n";
    bool shown = always || (gpu_options && config.*member != Config{}.*member);
    if (option == "head_dim_v") shown = config.head_dim_v != config.head_dim;
    if (!shown && sentence.find(option) == std::string_view::npos) return;
    text += (text.empty() ? "" : ", ") + std::string(option) + "=" + python_text(config.*member);
  });
  return text;
}

/// "swizzled, blocks_per_sm": the options that the configuration's kernel does not read but that are not at their
/// defaults.
template <class Config>
std::string options_of_other_kernels(Config const& config) {
  std::string names;
  Config::for_each_member([&](Option const& option, auto member) {
    if (reads(config.kernel, option.readers) || config.*member == Config{}.*member) return;
    names += (names.empty() ? "" : ", ") + std::string(option.name);
  });
  return names;
}

}  // namespace flashcute
