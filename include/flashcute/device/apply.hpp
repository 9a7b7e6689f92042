// How GPU kernels apply a mask to a block of scores: in the forward (sm80 and Hopper's), where rows are queries, and in
// the backward, where rows are queries or keys.
#pragma once

#include "flashcute/device/fragment.hpp"
#include "flashcute/policy/mask.hpp"

namespace flashcute {

/// Sets the scores of keys that a query does not see to -inf: by selection, not by adding -inf, because a hidden score
/// may be NaN. `query(i)` is the query of the thread's i-th row, `key` the key of its first column. L is the kernel's
/// layout, which knows the distances between a thread's columns.
template <class L, class Mask, class Scores, class Query>
FLASHCUTE_DEVICE void apply_mask(Scores& scores, Query const& query, int key, Sequence const& sequence) {
  auto s = by_row_and_column(scores);  // (row, column)
  constexpr int columns = decltype(cute::size<1>(s))::value;
  CUTE_UNROLL
  for (int i = 0; i < cute::size<0>(s); ++i) {
    auto const seen = Mask::seen(query(i), key, sequence);
    if constexpr (L::masks_by_bits) {
      CUTE_UNROLL
      for (int first = 0; first < columns; first += 32) {
        uint32_t const bits = seen.template bits<L>(first);  // one instruction (R2P) turns several bits into predicates
        CUTE_UNROLL
        for (int j = first; j < min_of(first + 32, columns); ++j) {
          if (!(bits & 1u << (j - first))) s(i, j) = -infinity;
        }
      }
    } else {
      CUTE_UNROLL
      for (int j = 0; j < columns; ++j) {
        if (!seen.at(L::column_distance(j))) s(i, j) = -infinity;
      }
    }
  }
}

/// Which elements of a block of the backward belong to a query and a key that it sees. Rows are those of the thread
/// block's tile, columns those of the block that its loop visits; `row` and `column` are those of the thread's first
/// element, and WarpsN warps share the columns.
template <class L, class Mask, bool KeysStay, int WarpsN>
struct VisibleElements {
  int row, column;
  Sequence sequence;

  /// The element in the thread's i-th row and j-th column. Rows that do not exist are never stored, so the answer for
  /// them does not matter.
  FLASHCUTE_DEVICE bool at(int i, int j) const {
    int const down = L::template row_distance<WarpsN>(i), across = L::template column_distance<WarpsN>(j);
    if constexpr (KeysStay) {
      return Mask::seen_by(row, column, sequence).at(across, down);
    } else {
      return Mask::seen(row + down, column, sequence).at(across);
    }
  }
};

}  // namespace flashcute
