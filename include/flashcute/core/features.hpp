// What a kernel computes, as far as it changes the code: taken from the arguments of a call, not chosen.
#pragma once

#include "flashcute/core/enums.hpp"

namespace flashcute {

struct Features {
  MaskKind mask = MaskKind::full;
  bool count_blocks = false;  // also tell which K/V blocks each tile visited

  constexpr bool operator==(Features const&) const = default;
};

/// Which passes read a feature: the forward alone, or every pass that computes scores.
enum class Readers : uint8_t { forward, scores };

constexpr bool reads(SinglePass, Readers) { return true; }
constexpr bool reads(BackwardPass pass, Readers readers) {
  if (readers == Readers::forward) return false;
  switch (pass) {
    case BackwardPass::queries:
    case BackwardPass::keys:
    case BackwardPass::gradients: return true;
    case BackwardPass::prepare:
    case BackwardPass::finish: return false;
  }
  return true;
}

/// A row of the table of features.
struct Feature {
  char const* name;  // of the field
  char const* word;  // of a boolean that is true, in the name of a kernel; an enumerator has its own
  Readers readers;
};

/// The table of features. Calls visit(row, field) for each, in order: names, generated source, hashes and what a pass
/// may ignore are written once from it.
template <class F, class Visitor>
constexpr void for_each_feature(F& f, Visitor&& visit) {
  visit(Feature{"mask", "", Readers::scores}, f.mask);
  visit(Feature{"count_blocks", "counting", Readers::forward}, f.count_blocks);
}

// Visitors that kernels' headers need are structs: NVRTC takes a lambda of a plain constexpr function for host code and
// refuses it.

struct FeatureBytes {
  size_t sum = 0;

  template <class Field>
  constexpr void operator()(Feature const&, Field const&) {
    sum += sizeof(Field);
  }
};

/// The bytes of the fields that the table has.
constexpr size_t bytes_of_features() {
  Features const features;
  FeatureBytes bytes;
  for_each_feature(features, bytes);
  return bytes.sum;
}
static_assert(bytes_of_features() == sizeof(Features),
              "every field of Features needs a row in for_each_feature (and there may be no padding)");

template <class Pass>
struct ForgetUnread {
  Pass pass;

  template <class Field>
  constexpr void operator()(Feature const& feature, Field& field) const {
    if (!reads(pass, feature.readers)) field = {};
  }
};

/// The features that the pass reads; the others are as in Features{}, the zeros of their types. Calls that differ in no
/// more than those share the pass's kernel.
template <class Pass>
constexpr Features relevant(Features features, Pass pass) {
  for_each_feature(features, ForgetUnread<Pass>{pass});
  return features;
}

/// Whether no feature is asked for but those whose fields are `known`. What computes asserts it of what it has code
/// for: a feature that it does not know is an error there, not left out of the result.
template <auto... known>
constexpr bool has_only(Features features) {
  ((features.*known = {}), ...);
  return features == Features{};
}
#define FLASHCUTE_UNKNOWN_FEATURE "this kernel has no code for one of the features that it is asked for"

}  // namespace flashcute
