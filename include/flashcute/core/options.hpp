// The options of a configuration as data. Each configuration has one table, for_each_member; names, hashes, generated
// source, Python's class and the rule about options of another kernel all come from it.
#pragma once

#include "flashcute/core/enums.hpp"

namespace flashcute {

/// Which GPU kernels read an option. The CPU reads only dtype and the sizes of a tile.
enum class ReadBy : uint8_t { all, sm80, sm90 };

constexpr bool reads(Kernel kernel, ReadBy readers) {
  switch (readers) {
    case ReadBy::all: return true;
    case ReadBy::sm80: return kernel == Kernel::sm80;
    case ReadBy::sm90: return kernel == Kernel::sm90;
  }
  return true;
}

/// A row of a configuration's table.
struct Option {
  char const* name;  // of the member
  ReadBy readers;
  /// The word that stands for a value other than the default in a configuration's name; an integer is followed by its
  /// value. An enumerator has a word of its own. Null if every name contains the option.
  char const* word = "";
};

/// Calls visit(option, value) for every option of a configuration, in order.
template <class Config, class Visit>
constexpr void for_each_option(Config& config, Visit&& visit) {
  std_::remove_const_t<Config>::for_each_member(
      [&](Option const& option, auto member) { visit(option, config.*member); });
}

// A struct, not a lambda, as the visitors of for_each_feature (features.hpp).
template <class Config>
struct ResetUnread {
  Config& config;

  template <class Member>
  constexpr void operator()(Option const& option, Member member) const {
    if (!reads(config.kernel, option.readers)) config.*member = Config{}.*member;
  }
};

/// Whether options that the configuration's kernel does not read have their defaults.
template <class Config>
constexpr bool has_only_own_options(Config const& config) {
  Config own = config;
  Config::for_each_member(ResetUnread<Config>{own});
  return own == config;
}

}  // namespace flashcute
