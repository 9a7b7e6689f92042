// The identity of a kernel, and its name.
#pragma once

#include "flashcute/features.hpp"

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

/// A hash of everything that tells kernels apart.
template <class Config>
constexpr size_t hash_of(KernelId<Config> const& kernel) {
  size_t hash = static_cast<size_t>(kernel.pass);
  auto const add = [&](auto value) { hash = hash * 1000003 + static_cast<size_t>(value); };
  for_each_option(kernel.config, [&](char const*, auto option) { add(option); });
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

/// Name of a GPU kernel, which is also its entry point: "flashcute_sm80_fwd_..._causal",
/// "flashcute_sm80_bwd_..._gradients_causal".
template <class Config>
constexpr Name name(KernelId<Config> const& kernel) {
  Name s;
  s << (kernel.config.math == Math::wgmma ? "flashcute_sm90_" : "flashcute_sm80_") << name(kernel.config).text;
  s.add_word(word_of(kernel.pass));
  for_each_feature(kernel.features, [&](Feature const& feature, auto value) {
    if (reads(kernel.pass, feature.readers)) s.add_word(word_of(feature, value));
  });
  return s;
}

}  // namespace flashcute
