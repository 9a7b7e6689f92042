// How GoogleTest prints our values: in words. Without these functions it prints their bytes.
#pragma once

#include <gtest/gtest.h>

#include <ostream>

#include "flashcute/api.hpp"

namespace flashcute {

template <TabulatedEnum Enum>
void PrintTo(Enum const& value, std::ostream* out) {
  *out << name_of(value);
}
inline void PrintTo(ForwardConfig const& config, std::ostream* out) { *out << to_string(config); }
inline void PrintTo(BackwardConfig const& config, std::ostream* out) { *out << to_string(config); }
inline void PrintTo(Features const& features, std::ostream* out) {
  for_each_feature(features, [&](Feature const& feature, auto value) {
    *out << feature.name << '=' << ::testing::PrintToString(value) << ' ';
  });
}
template <class Config>
void PrintTo(KernelId<Config> const& kernel, std::ostream* out) {
  *out << name(kernel).text;
}

/// The rule's sentence.
inline void PrintTo(ForwardConfigError error, std::ostream* out) {
  *out << (error == ForwardConfigError::none ? "no rule is broken" : sentence(error));
}
inline void PrintTo(BackwardConfigError error, std::ostream* out) {
  *out << (error == BackwardConfigError::none ? "no rule is broken" : sentence(error));
}

}  // namespace flashcute
