// Where a mask meets scores: how GPU kernels apply it to a block of them, in the forward (sm80 and Hopper's), where
// rows are queries, and in the backward, where rows are queries or keys; and how the softmax of a tile's rows ends.
#pragma once

#include "flashcute/device/fragment.hpp"
#include "flashcute/policy/mask.hpp"

namespace flashcute {

/// Sets the scores of keys that a query does not see to -inf, or `hidden`: by selection, not by adding -inf, because a
/// hidden score may be NaN. `seen_by(i)` says what the thread's i-th row sees. L is the kernel's layout, which knows the
/// distances between a thread's columns.
template <class L, class Scores, class SeenBy>
FLASHCUTE_DEVICE void hide_scores(Scores& scores, SeenBy const& seen_by, float hidden = -infinity) {
  auto s = by_row_and_column(scores);  // (row, column)
  constexpr int columns = decltype(cute::size<1>(s))::value;
  CUTE_UNROLL
  for (int i = 0; i < cute::size<0>(s); ++i) {
    auto const seen = seen_by(i);
    if constexpr (L::masks_by_bits) {
      CUTE_UNROLL
      for (int first = 0; first < columns; first += 32) {
        uint32_t const bits = seen.template bits<L>(first);  // one instruction (R2P) turns several bits into predicates
        CUTE_UNROLL
        for (int j = first; j < min_of(first + 32, columns); ++j) {
          if (!(bits & 1u << (j - first))) s(i, j) = hidden;
        }
      }
    } else {
      CUTE_UNROLL
      for (int j = 0; j < columns; ++j) {
        if (!seen.at(L::column_distance(j))) s(i, j) = hidden;
      }
    }
  }
}

/// The same under a mask. `query(i)` is the query of the thread's i-th row, `key` the key of its first column.
template <class L, class Mask, class Scores, class Query>
FLASHCUTE_DEVICE void apply_mask(Scores& scores, Query const& query, int key, typename Mask::Sequence const& sequence,
                                 float hidden = -infinity) {
  hide_scores<L>(
      scores, [&](int i) { return Mask::template seen<L::BlockN::value>(query(i), key, sequence); }, hidden);
}

/// The sink of a query head, of fp32 or Element; -inf if there is none.
template <class Element>
FLASHCUTE_DEVICE float sink_of(ForwardParams const& p, int head) {
  if (p.sink.logits == nullptr) return -infinity;
  if (p.sink.float32) return global_load<float>(static_cast<float const*>(p.sink.logits) + head);
  return static_cast<float>(global_load<Element>(static_cast<Element const*>(p.sink.logits) + head));
}

/// Divides the output of a tile's rows by the sums of their softmax. `row(i)` is the tile row of the thread's i-th.
template <class Mask, class Element, class Softmax, class Output, class Tile, class Row>
FLASHCUTE_DEVICE void finish_rows(Softmax& softmax, Output& o, ForwardParams const& p, Tile const& tile,
                                  Row const& row) {
  // Under a map finding that out takes a while; a row whose sum is not 0 has seen a key.
  auto const empty = [&](int i, float sum) {
    if constexpr (!Mask::Range::contiguous) {
      if (sum != 0.f) return false;
    }
    return Mask::empty_row(tile.row0 + row(i), tile.sequence(p));
  };
  if constexpr (Softmax::takes_sink) {
    auto const exists = [&](int i) { return tile.row0 + row(i) < tile.sequence(p).rows(); };
    softmax.finish(o, sink_of<Element>(p, tile.head), exists, empty);
    if constexpr (!Mask::Range::contiguous) {
      if (CellMap::overflowed(p)) softmax.spoil(o);
    }
  } else {
    softmax.finish(o, empty);
  }
}

/// Which elements of a block of the backward belong to a query and a key that it sees. Rows are those of the thread
/// block's tile, of which a thread has `Rows`, columns those of the block that its loop visits; `row` and `column` are
/// those of the thread's first element, and WarpsN warps share the columns.
template <class L, class Mask, bool KeysStay, int WarpsN, int Rows>
struct VisibleElements {
  static constexpr bool is_loaded = false;  // whether making one reads memory

  int row, column;
  typename Mask::Sequence sequence;

  /// The element in the thread's i-th row and j-th column. Rows that do not exist are never stored, so the answer for
  /// them does not matter.
  FLASHCUTE_DEVICE bool at(int i, int j) const {
    int const down = L::template row_distance<WarpsN>(i), across = L::template column_distance<WarpsN>(j);
    if constexpr (KeysStay) {
      return Mask::seen_by(row, column, sequence).at(across, down);
    } else {
      return Mask::template seen<L::BlockN::value>(row + down, column, sequence).at(across);
    }
  }
};

/// Under a map: its words along each of the thread's rows.
template <class L, bool KeysStay, int WarpsN, int Rows>
struct VisibleElements<L, Mask<MaskKind::mapped>, KeysStay, WarpsN, Rows> {
  using Mask = flashcute::Mask<MaskKind::mapped>;
  static constexpr bool is_loaded = true;
  static constexpr int columns = L::BlockN::value;
  static constexpr int spread = WarpsN == 1 ? 8 : 16 * WarpsN;

  SeenBits<columns, spread> seen[Rows];

  FLASHCUTE_DEVICE VisibleElements(int row, int column, MappedSequence const& sequence) {
    CUTE_UNROLL
    for (int i = 0; i < Rows; ++i) {
      int const at = row + L::template row_distance<WarpsN>(i);
      if constexpr (KeysStay) {
        seen[i] = Mask::queries_seeing<columns, spread>(at, column, sequence);
      } else {
        seen[i] = Mask::seen<columns, spread>(at, column, sequence);
      }
    }
  }

  FLASHCUTE_DEVICE bool at(int i, int j) const { return seen[i].at(L::template column_distance<WarpsN>(j)); }
};

}  // namespace flashcute
