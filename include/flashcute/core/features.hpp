// The features of a kernel: what it computes, as far as that changes its code. The arguments of a call determine them.
#pragma once

#include "flashcute/core/enums.hpp"

namespace flashcute {

struct Features {
  MaskKind mask = MaskKind::full;
  bool count_blocks = false;  // also count how each tile treated its K/V blocks

  constexpr bool operator==(Features const&) const = default;
};

/// Whether the softmax of a mask's kernels may include a sink.
constexpr bool takes_sink(MaskKind mask) { return mask == MaskKind::band || mask == MaskKind::mapped; }

/// Whether the sequences of a mask's kernels may be shorter than the tensors.
constexpr bool takes_sequences(MaskKind mask) { return mask == MaskKind::band || mask == MaskKind::mapped; }

/// Which passes read a feature: the forward alone, or every pass that computes scores or asks who sees what.
enum class Readers : uint8_t { forward, scores };

constexpr bool reads(SinglePass, Readers) { return true; }
constexpr bool reads(BackwardPass pass, Readers readers) {
  if (readers == Readers::forward) return false;
  switch (pass) {
    case BackwardPass::queries:
    case BackwardPass::keys:
    case BackwardPass::gradients:
    case BackwardPass::sink: return true;
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

/// The table of features: calls visit(row, field) for each, in order. Names, generated source, hashes and the features
/// that a pass ignores all come from it.
template <class F, class Visitor>
constexpr void for_each_feature(F& f, Visitor&& visit) {
  visit(Feature{"mask", "", Readers::scores}, f.mask);
  visit(Feature{"count_blocks", "counting", Readers::forward}, f.count_blocks);
}

// Visitors that device code needs are structs: NVRTC treats a lambda in a constexpr function without __device__ as host
// code and rejects the call.

struct FeatureBytes {
  size_t sum = 0;

  template <class Field>
  constexpr void operator()(Feature const&, Field const&) {
    sum += sizeof(Field);
  }
};

/// The sum of the sizes of the fields in the table.
constexpr size_t bytes_of_features() {
  Features const features;
  FeatureBytes bytes;
  for_each_feature(features, bytes);
  return bytes.sum;
}
static_assert(bytes_of_features() == sizeof(Features),
              "every field of Features needs a row in for_each_feature (and there may be no padding)");

/// What a pass that does not read a field still has to know of it: of a mask, which sequences its tiles belong to.
/// Those of the band may be of any kind.
template <class Field>
constexpr Field unread(Field) {
  return {};
}
constexpr MaskKind unread(MaskKind mask) { return takes_sequences(mask) ? MaskKind::band : MaskKind{}; }

template <class Pass>
struct ForgetUnread {
  Pass pass;

  template <class Field>
  constexpr void operator()(Feature const& feature, Field& field) const {
    if (!reads(pass, feature.readers)) field = unread(field);
  }
};

/// The features as far as they matter to the pass; the others have their defaults, which are zeros. Calls that differ
/// only in these share the kernel of the pass.
template <class Pass>
constexpr Features relevant(Features features, Pass pass) {
  for_each_feature(features, ForgetUnread<Pass>{pass});
  return features;
}

/// Whether only features whose fields are `known` are switched on. Each kernel asserts it of the features that it has
/// code for, so that a new feature is a compile error there and is not silently left out of the result.
template <auto... known>
constexpr bool has_only(Features features) {
  ((features.*known = {}), ...);
  return features == Features{};
}
#define FLASHCUTE_UNKNOWN_FEATURE "this kernel has no code for one of the features that it is asked for"

}  // namespace flashcute
