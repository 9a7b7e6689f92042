// What a query sees, from the definition of each mask and without the code that kernels and the CPU take.
#pragma once

#include <cstdint>
#include <limits>

#include "flashcute/core/enums.hpp"

namespace flashcute::definition {

struct MaskProblem {
  int64_t seqlen_k, causal_offset, window_offset;  // of the band: its last and its first diagonal
  // Of the band: how many queries exist, and the prefix.
  int64_t seqlen_q = std::numeric_limits<int64_t>::max(), prefix = std::numeric_limits<int64_t>::max();
  int64_t prefix_offset = 0;
  bool map_shows = true;  // whether the map shows the key to the query
};

inline bool sees(MaskKind kind, int64_t q, int64_t k, MaskProblem const& s) {
  if (k >= s.seqlen_k || q >= s.seqlen_q) return false;
  switch (kind) {
    case MaskKind::full: return true;
    case MaskKind::causal: return k <= q + s.causal_offset;
    case MaskKind::mapped:
      if (!s.map_shows) return false;
      [[fallthrough]];
    case MaskKind::band:
      return q + s.window_offset <= k && k <= q + s.causal_offset && (k < s.prefix || k <= q + s.prefix_offset);
  }
  return false;
}

}  // namespace flashcute::definition
