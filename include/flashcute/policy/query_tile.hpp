// The tiles into which the work is divided, each computed by one thread block or one task of the CPU's threads: query
// rows of one head, or keys of one K/V head.
#pragma once

#include "flashcute/policy/sequence.hpp"

namespace flashcute {

/// Tiles of `block_m` query rows of all heads of all batches.
FLASHCUTE_HD int64_t count_query_tiles(ForwardParams const& p, int32_t block_m) {
  return static_cast<int64_t>(p.batch) * p.heads * query_blocks(p, block_m);
}

/// Tiles of `block_keys` keys of all K/V heads of all batches.
FLASHCUTE_HD int64_t count_key_tiles(ForwardParams const& p, int32_t block_keys) {
  return static_cast<int64_t>(p.batch) * p.kv_heads * key_blocks(p, block_keys);
}

/// An order of the tiles of many heads in which the longest tiles start early, where they are the first of each head:
/// the first tiles of several heads come before the second tiles of these heads. The number of heads is limited so that
/// what their tiles read and write, `bytes_of_head` for each, fits in the level 2 cache.
template <class Index>
struct HeadsInTurn {
  Index first, width;  // the heads that take turns
  Index place;         // among their tiles

  FLASHCUTE_HD Index head() const { return first + place % width; }
  FLASHCUTE_HD int32_t tile() const { return static_cast<int32_t>(place / width); }

  static constexpr int64_t cache_bytes = 32 << 20;

  FLASHCUTE_HD static HeadsInTurn at(Index index, Index heads, Index tiles_of_head, int64_t bytes_of_head) {
    // On a GPU a division of 64-bit integers is a call of some hundred instructions, so floats are divided. Less than
    // all of the cache: what fits exactly must not be rounded up.
    auto const fitting = 0.999f * static_cast<float>(cache_bytes) / static_cast<float>(bytes_of_head + 1);
    auto const heads_at_once = min_of(heads, 1 + static_cast<Index>(fitting));
    Index const first = index / (heads_at_once * tiles_of_head) * heads_at_once;
    Index const width = min_of(heads_at_once, heads - first);
    return {first, width, index - first * tiles_of_head};
  }
};

/// Query rows [row0, row0 + rows) of one head and one sequence, of which `existing` exist: results of the others are
/// written too. Rows and keys count from the first of the sequence.
template <class S>
struct QueryTile {
  using Sequence = S;
  typename Sequence::Entry entry;  // of the batch
  int32_t head, kv_head;
  int32_t row0;  // first query row
  int32_t rows;  // in memory: block_m, or fewer at the end of the sequence; in a slot beyond it 0

  /// The sequence that the rows belong to.
  FLASHCUTE_HD Sequence sequence(ForwardParams const& p) const { return Sequence(p, entry, head); }
  FLASHCUTE_HD int32_t existing(ForwardParams const& p) const {
    if constexpr (Sequence::fills_tensors) return rows;
    return max_of(min_of(rows, sequence(p).rows() - row0), 0);
  }

  /// How many tiles each head has; packed, how many slots.
  FLASHCUTE_HD static int32_t blocks_of_head(ForwardParams const& p, int32_t block_m) {
    return Sequence::is_packed(p) ? query_blocks(p, block_m) : ceil_div(p.seqlen_q, block_m);
  }

  /// Tile `index` of `count_query_tiles(p, block_m)`. Within a head the last rows come first: under a causal mask they
  /// are the longest tiles, and long tiles should start early. A GPU passes its 32-bit block index, which
  /// avoids a 64-bit division.
  template <class Index>
  FLASHCUTE_HD static QueryTile at(ForwardParams const& p, Index index, int32_t block_m) {
    auto const row_blocks = static_cast<Index>(blocks_of_head(p, block_m));
    return of(p, index / row_blocks, static_cast<int32_t>(row_blocks - 1 - index % row_blocks), block_m);
  }

  /// The same with the tiles of several heads in turn, of tensors whose elements have `bytes`. Not for packed
  /// sequences.
  template <class Index>
  FLASHCUTE_HD static QueryTile in_turn(ForwardParams const& p, Index index, int32_t block_m, int32_t bytes) {
    auto const tiles = static_cast<Index>(ceil_div(p.seqlen_q, block_m));
    auto const heads = static_cast<Index>(p.batch) * static_cast<Index>(p.heads);
    int64_t const keys_of_head = static_cast<int64_t>(p.seqlen_k) * (p.head_dim + p.head_dim_v) * bytes;
    auto const turn = HeadsInTurn<Index>::at(index, heads, tiles, keys_of_head / (p.heads / p.kv_heads));
    return of(p, turn.head(), static_cast<int32_t>(tiles) - 1 - turn.tile(), block_m);
  }

  /// Tile `block` of the `head_index`-th head of all batches.
  template <class Index>
  FLASHCUTE_HD static QueryTile of(ForwardParams const& p, Index head_index, int32_t block, int32_t block_m) {
    if (Sequence::is_packed(p)) return of_slot(p, head_index, block, block_m, false);
    QueryTile t = whole_head(p, head_index);
    t.row0 = block * block_m;
    t.rows = min_of(block_m, p.seqlen_q - t.row0);
    return t;
  }

  /// The `i`-th tile of a head, counted from its last rows, which are cut off first: an incomplete tile has the first
  /// rows. Packed: slot `i`, with the tiles of each sequence in this order; `near`: the number of a sequence that is
  /// not far before its own.
  template <class Index>
  FLASHCUTE_HD static QueryTile from_end(ForwardParams const& p, Index head_index, int32_t i, int32_t block_m,
                                         int32_t near = 0) {
    if (Sequence::is_packed(p)) return of_slot(p, head_index, i, block_m, true, near);
    return whole_head(p, head_index).part_from_end(i, block_m);
  }

  /// All rows of the `head_index`-th head of all batches.
  template <class Index>
  FLASHCUTE_HD static QueryTile whole_head(ForwardParams const& p, Index head_index) {
    auto const heads = static_cast<Index>(p.heads);
    QueryTile t;
    t.entry = Sequence::Entry::of(p, static_cast<int32_t>(head_index / heads));
    t.head = static_cast<int32_t>(head_index % heads);
    t.kv_head = t.head / (p.heads / p.kv_heads);
    t.row0 = 0;
    t.rows = p.seqlen_q;
    return t;
  }

  /// Cuts the tile, from its last row on, into parts of `size` rows, and returns the `i`-th. The part with the tile's
  /// first rows may have fewer rows, and the parts after it have none.
  FLASHCUTE_HD QueryTile part_from_end(int32_t i, int32_t size) const {
    int32_t const end = row0 + rows - i * size;
    QueryTile part = *this;
    part.row0 = max_of(row0, end - size);
    part.rows = end - part.row0;
    return part;
  }

  /// The first row's element 0 in each tensor; for K and V, that of the sequence's first key.
  FLASHCUTE_HD int64_t q_offset(ForwardParams const& p) const {
    return row_offset(p.q_stride, entry.batch, head, entry.first_query + row0);
  }
  FLASHCUTE_HD int64_t k_offset(ForwardParams const& p) const {
    return row_offset(p.k_stride, entry.batch, kv_head, entry.first_key);
  }
  FLASHCUTE_HD int64_t v_offset(ForwardParams const& p) const {
    return row_offset(p.v_stride, entry.batch, kv_head, entry.first_key);
  }
  FLASHCUTE_HD int64_t out_offset(ForwardParams const& p) const {
    return row_offset(p.out_stride, entry.batch, head, entry.first_query + row0);
  }
  FLASHCUTE_HD int64_t lse_offset(ForwardParams const& p) const {
    return flashcute::lse_offset(p, entry.batch, head) + entry.first_query + row0;
  }

  /// Offset of the block counts of the tile that these rows are, or are a part of. It is the same whether tiles are cut
  /// from the first row on or from the last.
  FLASHCUTE_HD int64_t block_counts_offset(ForwardParams const& p, int32_t block_m) const {
    if (Sequence::is_packed(p)) {
      int32_t const length = Packing::of_queries(p).length(entry.number);
      int32_t const block = ceil_div(length, block_m) - ceil_div(length - row0, block_m);
      return static_cast<int64_t>(head) * query_blocks(p, block_m) + entry.first_query_block(block_m) + block;
    }
    int64_t const heads_to_here = static_cast<int64_t>(entry.batch) * p.heads + head + 1;
    return heads_to_here * ceil_div(p.seqlen_q, block_m) - ceil_div(p.seqlen_q - row0, block_m);
  }

 private:
  /// Of packed sequences.
  FLASHCUTE_HD static QueryTile of_slot(ForwardParams const& p, int64_t head, int32_t slot, int32_t block_m,
                                        bool last_rows_first, int32_t near = 0) {
    if constexpr (Sequence::fills_tensors) {
      return {};
    } else {
      Packing const queries = Packing::of_queries(p);
      int32_t const number = queries.sequence_of_slot(slot, block_m, near);
      QueryTile t;
      t.entry = Sequence::Entry::of_packed(p, number);
      t.head = static_cast<int32_t>(head);
      t.kv_head = t.head / (p.heads / p.kv_heads);
      int32_t const length = queries.length(number);
      int32_t const before = (slot - t.entry.first_query_block(block_m)) * block_m;
      t.row0 = last_rows_first ? max_of(0, length - before - block_m) : before;
      t.rows = max_of(0, min_of(block_m, length - before));
      return t;
    }
  }
};

/// One block of keys of one K/V head and one sequence, of which `existing` exist: a task of the backward that owns its
/// rows of dK and dV, for all query heads of the group. Keys count from the first of the sequence.
template <class Sequence>
struct KeyTile {
  typename Sequence::Entry entry;  // of the batch
  int32_t kv_head;
  int32_t row0;  // first key
  int32_t rows;  // in memory: block_keys, or fewer at the end of the sequence; in a slot beyond it 0

  /// The sequence that the keys belong to, as a query head of the group sees it; by default the first.
  FLASHCUTE_HD Sequence sequence(ForwardParams const& p, int32_t head) const { return Sequence(p, entry, head); }
  FLASHCUTE_HD Sequence sequence(ForwardParams const& p) const { return sequence(p, kv_head * (p.heads / p.kv_heads)); }
  FLASHCUTE_HD int32_t existing(ForwardParams const& p) const {
    if constexpr (Sequence::fills_tensors) return rows;
    return max_of(min_of(rows, sequence(p).keys() - row0), 0);
  }

  /// Tile `index` of `count_key_tiles(p, block_keys)`. Under a causal mask the first keys are seen by the most queries,
  /// and long tiles should start early. `bytes`: what they read and write for each element of Q and dO; by default
  /// these and the sums of dQ. Only tiles of heads from `first_head` on are numbered.
  template <class Index>
  FLASHCUTE_HD static KeyTile at(ForwardParams const& p, Index index, int32_t block_keys, int32_t bytes = 4,
                                 Index first_head = 0) {
    auto const heads = static_cast<Index>(p.batch) * static_cast<Index>(p.kv_heads) - first_head;
    int64_t const bytes_of_head = static_cast<int64_t>(p.seqlen_q) * (p.head_dim + p.head_dim_v) * bytes;
    auto const turn = HeadsInTurn<Index>::at(index, heads, tiles_of_head<Index>(p, block_keys), bytes_of_head);
    return of(p, first_head + turn.head(), turn.tile(), block_keys);
  }

  /// How many tiles each head has; packed, how many slots.
  template <class Index>
  FLASHCUTE_HD static Index tiles_of_head(ForwardParams const& p, int32_t block_keys) {
    return static_cast<Index>(Sequence::is_packed(p) ? key_blocks(p, block_keys) : ceil_div(p.seqlen_k, block_keys));
  }

  /// Tile `block` of the `head_index`-th K/V head of all batches.
  template <class Index>
  FLASHCUTE_HD static KeyTile of(ForwardParams const& p, Index head_index, int32_t block, int32_t block_keys) {
    if (Sequence::is_packed(p)) return of_slot(p, head_index, block, block_keys);
    KeyTile t;
    t.entry = Sequence::Entry::of(p, static_cast<int32_t>(head_index / p.kv_heads));
    t.kv_head = static_cast<int32_t>(head_index % p.kv_heads);
    t.row0 = block * block_keys;
    t.rows = min_of(block_keys, p.seqlen_k - t.row0);
    return t;
  }

 private:
  /// Of packed sequences.
  FLASHCUTE_HD static KeyTile of_slot(ForwardParams const& p, int64_t kv_head, int32_t slot, int32_t block_keys) {
    if constexpr (Sequence::fills_tensors) {
      return {};
    } else {
      Packing const keys = Packing::of_keys(p);
      int32_t const number = keys.sequence_of_slot(slot, block_keys);
      KeyTile t;
      t.entry = Sequence::Entry::of_packed(p, number);
      t.kv_head = static_cast<int32_t>(kv_head);
      t.row0 = (slot - keys.first_slot(number, block_keys)) * block_keys;
      t.rows = max_of(0, min_of(block_keys, keys.length(number) - t.row0));
      return t;
    }
  }
};

}  // namespace flashcute
