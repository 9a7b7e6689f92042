// The tiles into which the work is divided, each computed by one thread block or one task of the CPU's threads: query
// rows of one head, or keys of one K/V head.
#pragma once

#include "flashcute/policy/sequence.hpp"

namespace flashcute {

/// Tiles of `block_m` query rows of all heads of all batches.
FLASHCUTE_HD int64_t count_query_tiles(ForwardParams const& p, int32_t block_m) {
  return static_cast<int64_t>(p.batch) * p.heads * ceil_div<int64_t>(p.seqlen_q, block_m);
}

/// Tiles of `block_keys` keys of all K/V heads of all batches.
FLASHCUTE_HD int64_t count_key_tiles(ForwardParams const& p, int32_t block_keys) {
  return static_cast<int64_t>(p.batch) * p.kv_heads * ceil_div<int64_t>(p.seqlen_k, block_keys);
}

/// Query rows [row0, row0 + rows) of one head, of which `existing` belong to its sequence: results of the others are
/// written too.
template <class Sequence>
struct QueryTile {
  typename Sequence::Entry entry;  // of the batch
  int32_t head, kv_head;
  int32_t row0;  // first query row
  int32_t rows;  // rows of the tensor: block_m, or fewer at its end

  /// The sequence that the rows belong to.
  FLASHCUTE_HD Sequence sequence(ForwardParams const& p) const { return Sequence(p, entry); }
  FLASHCUTE_HD int32_t existing(ForwardParams const& p) const {
    if constexpr (Sequence::fills_tensors) return rows;
    return max_of(min_of(rows, sequence(p).rows() - row0), 0);
  }

  /// Tile `index` of `count_query_tiles(p, block_m)`. Within a head the last rows come first: under a causal mask they
  /// are the longest tiles, and long tiles should start early. A GPU passes its 32-bit block index, which
  /// avoids a 64-bit division.
  template <class Index>
  FLASHCUTE_HD static QueryTile at(ForwardParams const& p, Index index, int32_t block_m) {
    auto const row_blocks = static_cast<Index>(ceil_div(p.seqlen_q, block_m));
    return of(p, index / row_blocks, static_cast<int32_t>(row_blocks - 1 - index % row_blocks), block_m);
  }

  /// Tile `block` of the `head_index`-th head of all batches.
  template <class Index>
  FLASHCUTE_HD static QueryTile of(ForwardParams const& p, Index head_index, int32_t block, int32_t block_m) {
    QueryTile t = whole_head(p, head_index);
    t.row0 = block * block_m;
    t.rows = min_of(block_m, p.seqlen_q - t.row0);
    return t;
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
    return row_offset(p.q_stride, entry.batch, head, row0);
  }
  FLASHCUTE_HD int64_t k_offset(ForwardParams const& p) const {
    return row_offset(p.k_stride, entry.batch, kv_head, 0);
  }
  FLASHCUTE_HD int64_t v_offset(ForwardParams const& p) const {
    return row_offset(p.v_stride, entry.batch, kv_head, 0);
  }
  FLASHCUTE_HD int64_t out_offset(ForwardParams const& p) const {
    return row_offset(p.out_stride, entry.batch, head, row0);
  }
  FLASHCUTE_HD int64_t lse_offset(ForwardParams const& p) const {
    return flashcute::lse_offset(p, entry.batch, head) + row0;
  }

  /// Offset of the block counts of the tile that these rows are, or are a part of. It is the same whether tiles are cut
  /// from the first row on or from the last.
  FLASHCUTE_HD int64_t block_counts_offset(ForwardParams const& p, int32_t block_m) const {
    int64_t const heads_to_here = static_cast<int64_t>(entry.batch) * p.heads + head + 1;
    return heads_to_here * ceil_div(p.seqlen_q, block_m) - ceil_div(p.seqlen_q - row0, block_m);
  }
};

/// One block of keys of one K/V head, of which `existing` belong to its sequence: a task of the backward that owns its
/// rows of dK and dV, for all query heads of the group.
template <class Sequence>
struct KeyTile {
  typename Sequence::Entry entry;  // of the batch
  int32_t kv_head;
  int32_t row0;  // first key
  int32_t rows;  // keys of the tensor: block_keys, or fewer at its end

  /// The sequence that the keys belong to.
  FLASHCUTE_HD Sequence sequence(ForwardParams const& p) const { return Sequence(p, entry); }
  FLASHCUTE_HD int32_t existing(ForwardParams const& p) const {
    if constexpr (Sequence::fills_tensors) return rows;
    return max_of(min_of(rows, sequence(p).keys() - row0), 0);
  }

  static constexpr int64_t cache_bytes = 32 << 20;

  /// Tile `index` of `count_key_tiles(p, block_keys)`. Under a causal mask the first keys are seen by the most queries,
  /// and long tiles should start early: the first tiles of several heads come before the second tiles of these heads.
  /// The number of heads is limited so that what their tiles read and write of the queries (Q, dO and the sums of dQ)
  /// fits in the level 2 cache.
  template <class Index>
  FLASHCUTE_HD static KeyTile at(ForwardParams const& p, Index index, int32_t block_keys) {
    auto const blocks = static_cast<Index>(ceil_div(p.seqlen_k, block_keys));
    auto const heads = static_cast<Index>(p.batch) * static_cast<Index>(p.kv_heads);
    int64_t const bytes_of_head = static_cast<int64_t>(p.seqlen_q) * (p.head_dim + p.head_dim_v) * 4;
    auto const heads_at_once = static_cast<Index>(min_of<int64_t>(heads, 1 + cache_bytes / (bytes_of_head + 1)));
    Index const first = index / (heads_at_once * blocks) * heads_at_once;
    Index const width = min_of(heads_at_once, heads - first);
    Index const place = index - first * blocks;
    Index const head_index = first + place % width;
    KeyTile t;
    t.entry = Sequence::Entry::of(p, static_cast<int32_t>(head_index / p.kv_heads));
    t.kv_head = static_cast<int32_t>(head_index % p.kv_heads);
    t.row0 = static_cast<int32_t>(place / width) * block_keys;
    t.rows = min_of(block_keys, p.seqlen_k - t.row0);
    return t;
  }
};
}  // namespace flashcute
