// The identity of a kernel: its configuration, pass and features; and the name made from them.
#pragma once

#include "flashcute/core/features.hpp"
#include "flashcute/core/options.hpp"

namespace flashcute {

/// One kernel: how it computes, which launch of the call it is, and what it computes.
template <class Config>
struct KernelId {
  Config config;
  typename Config::Pass pass{};
  Features features;

  constexpr bool operator==(KernelId const&) const = default;
};

/// The kernel of a pass for a call with these features.
template <class Config>
constexpr KernelId<Config> kernel_of(Config const& config, typename Config::Pass pass, Features const& features) {
  return {config, pass, relevant(features, pass)};
}

/// A hash of everything that distinguishes kernels.
template <class Config>
constexpr size_t hash_of(KernelId<Config> const& kernel) {
  size_t hash = static_cast<size_t>(kernel.pass);
  auto const add = [&](auto value) { hash = hash * 1000003 + static_cast<size_t>(value); };
  for_each_option(kernel.config, [&](Option const&, auto value) { add(value); });
  for_each_feature(kernel.features, [&](Feature const&, auto field) { add(field); });
  return hash;
}

// ---- names ---------------------------------------------------------------------------------------

/// A short string that constant expressions can build.
struct Name {
  char text[384] = {};  // enough for any values of the options and features
  int32_t length = 0;

  constexpr Name& operator<<(char const* s) {
    while (*s != '\0') text[length++] = *s++;
    return *this;
  }
  constexpr Name& operator<<(int32_t value) {
    if (value < 0) *this << "-";  // in messages about an invalid configuration
    auto rest = value < 0 ? -static_cast<int64_t>(value) : static_cast<int64_t>(value);
    char digits[12] = {};
    int32_t n = 0;
    do {
      digits[n++] = static_cast<char>('0' + rest % 10);
      rest /= 10;
    } while (rest > 0);
    while (n > 0) text[length++] = digits[--n];
    return *this;
  }

  /// Appends "_word"; nothing for "".
  constexpr Name& add_word(char const* word) {
    if (*word != '\0') *this << "_" << word;
    return *this;
  }
};

constexpr char const* word_of(Feature const& feature, bool value) { return value ? feature.word : ""; }
constexpr char const* word_of(Feature const&, TabulatedEnum auto value) { return word_of(value); }

/// Appends the word of an option that differs from its default.
template <class Config>
struct OptionWord {
  Name& name;
  Config const& config;

  template <class T>
  constexpr void operator()(Option const& option, T Config::* member) const {
    T const value = config.*member;
    if (option.word == nullptr || value == Config{}.*member) return;
    if constexpr (TabulatedEnum<T>) {
      name.add_word(word_of(value));
    } else {
      name.add_word(option.word);
      if constexpr (!std_::is_same_v<T, bool>) name << value;
    }
  }
};

/// "fwd_bf16_d128_m64_n64_w4", where "fwd" is the kind, and a word for every option that differs from the defaults.
template <class Config>
constexpr Name option_words(char const* kind, Config const& c) {
  Name s;
  s << kind << "_" << word_of(c.dtype) << "_d" << c.head_dim;
  if (c.head_dim_v != c.head_dim) s << "_dv" << c.head_dim_v;
  s << "_m" << c.block_m << "_n" << c.block_n << "_w" << c.num_warps;
  Config::for_each_member(OptionWord<Config>{s, c});
  return s;
}

/// Name of a GPU kernel, which is also its entry point: "flashcute_sm80_fwd_..._causal",
/// "flashcute_sm80_bwd_..._gradients_causal".
template <class Config>
constexpr Name name(KernelId<Config> const& kernel) {
  Config rest = kernel.config;
  rest.kernel = {};  // the prefix names it
  Name s;
  s << "flashcute_" << name_of(kernel.config.kernel) << "_" << name(rest).text;
  s.add_word(word_of(kernel.pass));
  for_each_feature(kernel.features, [&](Feature const& feature, auto value) {
    if (reads(kernel.pass, feature.readers) || value != decltype(value){}) s.add_word(word_of(feature, value));
  });
  return s;
}

}  // namespace flashcute
