// Debug mode: counts the K/V blocks that a tile of query rows visits, where the loop visits them, to be compared with
// what the mask implies.
#pragma once

#include "flashcute/policy/mask.hpp"

namespace flashcute {

template <bool Enabled>
struct BlockCounter {
  int32_t full = 0, partial = 0;

  FLASHCUTE_HD void visit(bool is_partial) { ++(is_partial ? partial : full); }

  /// The counts; all other blocks of the sequence were skipped.
  template <class Sequence>
  FLASHCUTE_HD BlockCounts counts(Sequence const& sequence, int32_t block_n) const {
    return {full, partial, ceil_div(sequence.keys(), block_n) - full - partial};
  }
};

/// For kernels that do not count: no code, no registers.
template <>
struct BlockCounter<false> {
  FLASHCUTE_HD void visit(bool) {}
};

}  // namespace flashcute
