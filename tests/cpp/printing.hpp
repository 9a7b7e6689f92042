// How GoogleTest prints our values: in words. Without these functions it prints their bytes.
#pragma once

#include <ostream>

#include "flashcute/api.hpp"

namespace flashcute {

inline void PrintTo(DType value, std::ostream* out) { *out << name_of(value); }
inline void PrintTo(Math value, std::ostream* out) { *out << name_of(value); }
inline void PrintTo(MaskKind value, std::ostream* out) { *out << name_of(value); }
inline void PrintTo(ForwardConfig const& config, std::ostream* out) { *out << to_string(config); }
inline void PrintTo(BackwardConfig const& config, std::ostream* out) { *out << to_string(config); }
inline void PrintTo(ForwardKernelId const& kernel, std::ostream* out) { *out << name(kernel).text; }
inline void PrintTo(BackwardKernelId const& kernel, std::ostream* out) { *out << name(kernel).text; }

/// The rule's sentence.
inline void PrintTo(ForwardConfigError error, std::ostream* out) {
  *out << (error == ForwardConfigError::none ? "no rule is broken" : sentence(error));
}
inline void PrintTo(BackwardConfigError error, std::ostream* out) {
  *out << (error == BackwardConfigError::none ? "no rule is broken" : sentence(error));
}

}  // namespace flashcute
