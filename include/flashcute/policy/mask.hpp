// Masks: which keys a query sees. `kv_range` returns the blocks of keys that a tile of query rows must visit,
// `query_range` the blocks of query rows that a tile of keys must visit, `visible` whether a query sees a key, `seen`
// which of many keys a query sees, `queries_seeing` which of many queries see a key, `seen_by` which of them see which
// keys, `empty_row` whether a query sees none. `rows_differ` says whether queries may see different keys. A mask under
// which the keys of each query are contiguous also has `keys_of`, their range. GPU kernels, the CPU backend and the
// tests share these.
#pragma once

#include "flashcute/core/forward_config.hpp"
#include "flashcute/policy/block_map.hpp"
#include "flashcute/policy/query_tile.hpp"

namespace flashcute {

/// The keys that one query sees, from a given key on: the first `count` of them.
struct Seen {
  int32_t count;

  FLASHCUTE_HD bool at(int32_t distance) const { return distance < count; }

  /// The same for 32 of a thread's columns, from its `first`-th on, as bits. `Columns::columns_before(distance)`
  /// returns how many of the thread's columns lie less than `distance` from its first.
  template <class Columns>
  FLASHCUTE_HD uint32_t bits(int32_t first) const {
    return low_bits(Columns::columns_before(count) - first);
  }
};

/// What one query sees of the keys from some key on if keys are hidden on both sides: those at distances [first, end).
struct SeenBetween {
  int32_t first, end;

  FLASHCUTE_HD static SeenBetween of(RowRange const& seen, int32_t from) {
    return {seen.begin - from, seen.end - from};
  }

  FLASHCUTE_HD bool at(int32_t distance) const { return (first <= distance) & (distance < end); }

  template <class Columns>
  FLASHCUTE_HD uint32_t bits(int32_t from) const {
    return low_bits(Columns::columns_before(end) - from) & ~low_bits(Columns::columns_before(first) - from);
  }
};

/// The same for a tile of keys and a block of queries: which of the queries from `query0` on see which of the keys from
/// `key0` on.
template <class Mask, class Sequence>
struct SeenBy {
  int32_t key0, query0;
  Sequence sequence;

  /// Whether the query exists and sees the key. (Keys of the tile that do not exist need no test: their rows are not
  /// stored.) Written query by query: with a range of queries for each key nvcc 13.0 generates other code.
  FLASHCUTE_HD bool at(int32_t query, int32_t key) const {
    bool const exists = query0 + query < sequence.rows();
    return exists & Mask::template seen<>(query0 + query, key0, sequence).at(key);
  }
};

/// A mask under which a row sees a prefix of the keys that never shrinks from row to row: the last row of a tile
/// determines which blocks to visit, the first row which of them are full.
template <class Derived>
struct PrefixMask {
  using Sequence = UniformSequence;
  using Range = KvRange;
  using Announced = Range;  // what Hopper's loading warp tells of a range
  using Passing = PassingBlocks;
  static constexpr bool two_edges = false;  // whether a block may be partial on both sides

  template <class S>
  FLASHCUTE_HD static bool visible(int32_t q, int32_t k, S const& s) {
    return k < Derived::visible_keys(q, s);
  }

  /// The keys that query `q` sees.
  template <class S>
  FLASHCUTE_HD static RowRange keys_of(int32_t q, S const& s) {
    return {0, Derived::visible_keys(q, s)};
  }

  /// Which of the keys from `key0` on query `q` sees. `count`: how many of them are asked for; of a range it does not
  /// matter.
  template <int32_t count = 0, class S>
  FLASHCUTE_HD static Seen seen(int32_t q, int32_t key0, S const& s) {
    return {Derived::visible_keys(q, s) - key0};
  }

  /// Which of the queries from `query0` on see key `k`; `count` as of `seen`.
  template <int32_t count = 0, class S>
  FLASHCUTE_HD static SeenBetween queries_seeing(int32_t k, int32_t query0, S const& s) {
    return SeenBetween::of(Derived::queries_of(k, s), query0);
  }

  template <class S>
  FLASHCUTE_HD static SeenBy<Derived, S> seen_by(int32_t key0, int32_t query0, S const& s) {
    return {key0, query0, s};
  }

  template <class S>
  FLASHCUTE_HD static KvRange kv_range(QueryTile<S> const& tile, ForwardParams const& p, int32_t block_n) {
    auto const sequence = tile.sequence(p);
    int32_t const first = Derived::visible_keys(tile.row0, sequence);
    int32_t const last = Derived::visible_keys(tile.row0 + tile.rows - 1, sequence);
    return {0, first / block_n, ceil_div(last, block_n)};
  }

  /// The queries that see a key.
  template <class S>
  FLASHCUTE_HD static RowRange queries_of(int32_t k, S const& s) {
    return k < s.keys() ? RowRange{Derived::first_query(k, s), s.rows()} : RowRange{0, 0};
  }

  /// The blocks of query rows that see any of the tile's keys: from the first row that sees its first key.
  template <class S>
  FLASHCUTE_HD static QueryRange query_range(KeyTile<S> const& tile, ForwardParams const& p, int32_t block_m) {
    auto const sequence = tile.sequence(p);
    int32_t const any = Derived::first_query(tile.row0, sequence);
    int32_t const all = Derived::first_query(tile.row0 + tile.rows - 1, sequence);
    int32_t const end = any < sequence.rows() ? ceil_div(sequence.rows(), block_m) : 0;
    return {any / block_m, ceil_div(all, block_m), end};
  }

  /// A row that sees nothing has output 0 and LSE -inf.
  template <class S>
  FLASHCUTE_HD static bool empty_row(int32_t q, S const& s) {
    return Derived::visible_keys(q, s) == 0;
  }
  template <class S>
  FLASHCUTE_HD static bool has_empty_rows(S const& s) {
    return empty_row(0, s);
  }
};

template <MaskKind Kind>
struct Mask;

/// Every key of the sequence.
template <>
struct Mask<MaskKind::full> : PrefixMask<Mask<MaskKind::full>> {
  static constexpr bool rows_differ = false;  // whether a row may see a key that another row does not

  template <class S>
  FLASHCUTE_HD static int32_t visible_keys(int32_t /*q*/, S const& s) {
    return s.keys();
  }

  /// The first row that sees key `k`; sequence.rows() if none does.
  template <class S>
  FLASHCUTE_HD static int32_t first_query(int32_t /*k*/, S const& /*s*/) {
    return 0;
  }
};

/// Keys j <= i + diagonal.
template <>
struct Mask<MaskKind::causal> : PrefixMask<Mask<MaskKind::causal>> {
  static constexpr bool rows_differ = true;

  template <class S>
  FLASHCUTE_HD static int32_t visible_keys(int32_t q, S const& s) {
    return max_of(0, min_of(q + s.diagonal() + 1, s.keys()));
  }

  template <class S>
  FLASHCUTE_HD static int32_t first_query(int32_t k, S const& s) {
    return max_of(0, min_of(k - s.diagonal(), s.rows()));
  }
};

/// Keys i + first_diagonal <= j <= i + diagonal, without those that are neither before the prefix nor up to i +
/// prefix_diagonal. What a row sees neither begins nor ends before what the row before sees. The sequence may be
/// shorter than the tensors; what does not exist sees nothing and is not seen.
template <>
struct Mask<MaskKind::band> {
  using Sequence = BatchSequence;
  using Range = BandRange;
  using Announced = Range;
  using Passing = PassingBlocks;
  static constexpr bool two_edges = true;
  static constexpr bool rows_differ = true;

  FLASHCUTE_HD static RowRange keys_of(int32_t q, BatchSequence const& s) {
    return q < s.rows() ? keys_of_existing(q, s) : RowRange{0, 0};
  }

  /// The queries that see a key.
  FLASHCUTE_HD static RowRange queries_of(int32_t k, BatchSequence const& s) {
    return k < s.keys() ? queries_of_existing(k, s) : RowRange{0, 0};
  }

  FLASHCUTE_HD static bool visible(int32_t q, int32_t k, BatchSequence const& s) { return keys_of(q, s).has(k); }

  /// A query that does not exist counts as the last one that does: were it to see nothing, the maximum of its scores
  /// would remain -inf, for which Hopper's softmax computes exponentials twice. Its results are not used.
  template <int32_t count = 0>
  FLASHCUTE_HD static SeenBetween seen(int32_t q, int32_t key0, BatchSequence const& s) {
    int32_t const query = min_of(q, s.rows() - 1);
    return {query + s.first_diagonal() - key0, end_of(query, s) - key0};
  }

  /// Which of the queries from `query0` on see key `k`.
  template <int32_t count = 0>
  FLASHCUTE_HD static SeenBetween queries_seeing(int32_t k, int32_t query0, BatchSequence const& s) {
    return SeenBetween::of(queries_of(k, s), query0);
  }

  FLASHCUTE_HD static SeenBy<Mask, BatchSequence> seen_by(int32_t key0, int32_t query0, BatchSequence const& s) {
    return {key0, query0, s};
  }

  template <class S>
  FLASHCUTE_HD static BandRange kv_range(QueryTile<S> const& tile, ForwardParams const& p, int32_t block_n) {
    int32_t const existing = tile.existing(p);
    if (existing == 0) return {0, 0, 0, 0};
    auto const sequence = tile.sequence(p);
    return BandRange::of(keys_of_existing(tile.row0, sequence), keys_of_existing(tile.row0 + existing - 1, sequence),
                         block_n);
  }

  template <class S>
  FLASHCUTE_HD static QueryBandRange query_range(KeyTile<S> const& tile, ForwardParams const& p, int32_t block_m) {
    int32_t const existing = tile.existing(p);
    if (existing == 0) return {0, 0, 0, 0};
    auto const sequence = tile.sequence(p);
    auto const r = BandRange::of(queries_of_existing(tile.row0, sequence),
                                 queries_of_existing(tile.row0 + existing - 1, sequence), block_m);
    return {r.begin, r.full_begin, r.full_end, r.end};
  }

  FLASHCUTE_HD static bool empty_row(int32_t q, BatchSequence const& s) { return keys_of(q, s).empty(); }

 private:
  /// The first key after those that a query sees.
  FLASHCUTE_HD static int32_t end_of(int32_t q, BatchSequence const& s) {
    int32_t const shown = max_of(q + s.prefix_diagonal() + 1, s.prefix());
    return min_of(min_of(q + s.diagonal() + 1, shown), s.keys());
  }

  FLASHCUTE_HD static RowRange keys_of_existing(int32_t q, BatchSequence const& s) {
    return {clamped(q + s.first_diagonal(), s.keys()), max_of(end_of(q, s), 0)};
  }

  FLASHCUTE_HD static RowRange queries_of_existing(int32_t k, BatchSequence const& s) {
    int32_t const first = k < s.prefix() ? k - s.diagonal() : k - min_of(s.diagonal(), s.prefix_diagonal());
    return {clamped(first, s.rows()), clamped(k - s.first_diagonal() + 1, s.rows())};
  }

  FLASHCUTE_HD static int32_t clamped(int32_t x, int32_t most) { return max_of(0, min_of(x, most)); }
};

/// What a band and a block map both show.
template <>
struct Mask<MaskKind::mapped> {
  using Sequence = MappedSequence;
  using Range = MapBlocks;
  using Announced = BandRange;
  using Passing = PassingCells;
  using Band = Mask<MaskKind::band>;
  static constexpr bool two_edges = true;
  static constexpr bool rows_differ = true;

  /// The keys between the first and the last that a query may see; none if it sees none.
  template <class S>
  FLASHCUTE_HD static RowRange keys_of(int32_t q, S const& s) {
    RowRange const shown = Band::keys_of(q, s);
    return empty_within(q, shown, s) ? RowRange{0, 0} : shown;
  }

  template <class S>
  FLASHCUTE_HD static bool visible(int32_t q, int32_t k, S const& s) {
    return Band::visible(q, k, s) && s.by_query().sees(q, k);
  }

  /// A query that does not exist counts as the last one that does, as under a band.
  template <int32_t count, int32_t spread = 8, class S>
  FLASHCUTE_HD static SeenBits<count, spread> seen(int32_t q, int32_t key0, S const& s) {
    int32_t const query = min_of(q, s.rows() - 1);
    return SeenBits<count, spread>::of(s.by_query(), Band::keys_of(query, s), query, key0);
  }

  /// Which of the queries from `query0` on see key `k`.
  template <int32_t count, int32_t spread = 8, class S>
  FLASHCUTE_HD static SeenBits<count, spread> queries_seeing(int32_t k, int32_t query0, S const& s) {
    return SeenBits<count, spread>::of(s.by_key(), Band::queries_of(k, s), k, query0);
  }

  template <class S>
  FLASHCUTE_HD static MapBlocks kv_range(QueryTile<S> const& tile, ForwardParams const& p, int32_t block_n) {
    return MapBlocks(pages(tile, p, block_n));
  }
  /// The same, 32 blocks at a time.
  template <class S>
  FLASHCUTE_HD static MapPages pages(QueryTile<S> const& tile, ForwardParams const& p, int32_t block_n) {
    BandRange const band = Band::kv_range(tile, p, block_n);
    return {band, tile.sequence(p).by_query(), tile.row0, tile.existing(p), block_n};
  }

  /// Of the first query head of the tile's.
  template <class S>
  FLASHCUTE_HD static MapQueryBlocks query_range(KeyTile<S> const& tile, ForwardParams const& p, int32_t block_m) {
    QueryBandRange const r = Band::query_range(tile, p, block_m);
    BandRange const band{r.begin, r.full_begin, r.full_end, r.end};
    return MapQueryBlocks(MapPages(band, tile.sequence(p).by_key(), tile.row0, tile.existing(p), block_m));
  }

  template <class S>
  FLASHCUTE_HD static bool empty_row(int32_t q, S const& s) {
    return empty_within(q, Band::keys_of(q, s), s);
  }

 private:
  template <class S>
  FLASHCUTE_HD static bool empty_within(int32_t q, RowRange const& shown, S const& s) {
    return shown.empty() || (s.has_map() && !s.by_query().sees_any(q, shown));
  }
};

}  // namespace flashcute
