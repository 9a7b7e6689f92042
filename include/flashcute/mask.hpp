// Which keys a query sees. A mask is four functions: `kv_range`, the K/V blocks that a tile of query
// rows must visit; `query_range`, the blocks of query rows that a block of keys must; `visible`, the truth
// about one element; and `from`, the same for many keys of one query, at constant distances from the first.
// GPU kernels, the CPU backend and the tests share them.
#pragma once

#include "flashcute/config.hpp"
#include "flashcute/kv_blocks.hpp"
#include "flashcute/query_tile.hpp"

namespace flashcute {

/// What a query sees of the keys from some key on, if it sees a prefix of all keys.
struct KeysSeen {
  int32_t count;

  FLASHCUTE_HD bool at(int32_t distance) const { return distance < count; }
};

/// A mask under which a row sees a prefix of the keys that never shrinks from row to row: the last row
/// of a tile says which blocks to visit, the first row which are full.
template <class Derived>
struct PrefixMask {
  FLASHCUTE_HD static bool visible(int32_t q, int32_t k, Sequence const& s) { return k < Derived::visible_keys(q, s); }

  /// Of query q: what it sees of the keys from `key` on.
  FLASHCUTE_HD static KeysSeen from(int32_t q, int32_t key, Sequence const& s) {
    return {Derived::visible_keys(q, s) - key};
  }

  FLASHCUTE_HD static KvRange kv_range(QueryTile const& tile, ForwardParams const& p, int32_t block_n) {
    auto const sequence = tile.sequence(p);
    int32_t const first = Derived::visible_keys(tile.row0, sequence);
    int32_t const last = Derived::visible_keys(tile.row0 + tile.rows - 1, sequence);
    return {0, first / block_n, ceil_div(last, block_n)};
  }

  /// The blocks of query rows that see any of the tile's keys: from the first row that sees its first key.
  FLASHCUTE_HD static QueryRange query_range(KeyTile const& tile, ForwardParams const& p, int32_t block_m) {
    auto const sequence = tile.sequence(p);
    int32_t const any = Derived::first_query(tile.row0, sequence);
    int32_t const all = Derived::first_query(tile.row0 + tile.rows - 1, sequence);
    int32_t const end = any < sequence.rows() ? ceil_div(sequence.rows(), block_m) : 0;
    return {any / block_m, ceil_div(all, block_m), end};
  }

  /// A row that sees nothing has output 0 and LSE -inf.
  FLASHCUTE_HD static bool empty_row(int32_t q, Sequence const& s) { return Derived::visible_keys(q, s) == 0; }
};

template <MaskKind Kind>
struct Mask;

/// Every key of the sequence.
template <>
struct Mask<MaskKind::full> : PrefixMask<Mask<MaskKind::full>> {
  static constexpr bool rows_differ = false;  // whether a row may see a key that another row does not

  FLASHCUTE_HD static int32_t visible_keys(int32_t /*q*/, Sequence const& s) { return s.keys(); }

  /// The first row that sees a key; `rows` if none does.
  FLASHCUTE_HD static int32_t first_query(int32_t /*k*/, Sequence const& /*s*/) { return 0; }
};

/// Keys j <= i + diagonal.
template <>
struct Mask<MaskKind::causal> : PrefixMask<Mask<MaskKind::causal>> {
  static constexpr bool rows_differ = true;

  FLASHCUTE_HD static int32_t visible_keys(int32_t q, Sequence const& s) {
    int64_t const keys = static_cast<int64_t>(q) + s.diagonal() + 1;
    return static_cast<int32_t>(max_of<int64_t>(0, min_of<int64_t>(keys, s.keys())));
  }

  FLASHCUTE_HD static int32_t first_query(int32_t k, Sequence const& s) {
    int64_t const row = static_cast<int64_t>(k) - s.diagonal();
    return static_cast<int32_t>(max_of<int64_t>(0, min_of<int64_t>(row, s.rows())));
  }
};

}  // namespace flashcute
