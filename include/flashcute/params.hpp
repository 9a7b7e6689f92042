// What one launch of the forward needs to know: plain data, passed by value as the kernel's only
// parameter and read by the CPU backend too.
#pragma once

#include "flashcute/std.hpp"

namespace flashcute {

/// Element (not byte) distances between neighbours. The last dimension always has stride 1.
struct Strides {
  int64_t batch, row, head;
};

/// How a tile of query rows treated the K/V blocks of its sequence.
struct BlockCounts {
  int32_t full;     // visited, without a test of elements
  int32_t partial;  // visited, with one
  int32_t skipped;  // never touched
};

/// Where element 0 of a row lies.
FLASHCUTE_HD int64_t row_offset(Strides const& s, int64_t batch, int64_t head, int64_t row) {
  return batch * s.batch + head * s.head + row * s.row;
}

struct ForwardParams {
  void const* q;              // (batch, seqlen_q, heads,    head_dim)
  void const* k;              // (batch, seqlen_k, kv_heads, head_dim)
  void const* v;              // (batch, seqlen_k, kv_heads, head_dim_v)
  void* out;                  // (batch, seqlen_q, heads,    head_dim_v)
  void* lse;                  // (batch, heads, seqlen_q), contiguous; fp32, or fp64 with fp64 inputs; may be null
  BlockCounts* block_counts;  // (batch, heads, row blocks); null unless Features::count_blocks

  Strides q_stride, k_stride, v_stride, out_stride;

  double scale;      // of the scores: softmax(scale * Q K^T)
  float scale_log2;  // scale * log2(e), for the base-2 softmax of the GPU kernels

  int32_t batch, heads, kv_heads;
  int32_t seqlen_q, seqlen_k;
  int32_t head_dim, head_dim_v;
  int32_t causal_offset;  // causal: query i sees key j iff j <= i + causal_offset
};

// The host (g++) fills the struct, the device compiler reads it: both assert the layout.
static_assert(sizeof(Strides) == 24);
static_assert(sizeof(BlockCounts) == 12);
static_assert(sizeof(ForwardParams) == 192);
#if !defined(__CUDACC_RTC__)  // NVRTC's offsetof is no constant expression
static_assert(offsetof(ForwardParams, q_stride) == 48);
static_assert(offsetof(ForwardParams, out_stride) == 120);
static_assert(offsetof(ForwardParams, scale) == 144);
static_assert(offsetof(ForwardParams, batch) == 156);
static_assert(offsetof(ForwardParams, causal_offset) == 184);
#endif

/// One tile of query rows of one head: what a thread block, or a CPU task, computes.
struct QueryTile {
  int32_t batch, head, kv_head;
  int32_t row0;  // first query row
  int32_t rows;  // rows that exist: block_m, or fewer at the end of the sequence

  /// Tile `index` of `count(p, block_m)`. Within a head the last rows come first: under a causal mask they
  /// are the longest tiles, and the long ones should start early. A GPU passes its 32-bit block index, to
  /// be spared a 64-bit division.
  template <class Index>
  FLASHCUTE_HD static QueryTile at(ForwardParams const& p, Index index, int32_t block_m) {
    auto const row_blocks = static_cast<Index>(ceil_div(p.seqlen_q, block_m));
    return of(p, index / row_blocks, static_cast<int32_t>(row_blocks - 1 - index % row_blocks), block_m);
  }

  /// Of the `head_index`-th head of all batches, the `block`-th tile.
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
    t.batch = static_cast<int32_t>(head_index / heads);
    t.head = static_cast<int32_t>(head_index % heads);
    t.kv_head = t.head / (p.heads / p.kv_heads);
    t.row0 = 0;
    t.rows = p.seqlen_q;
    return t;
  }

  /// The `i`-th of the parts of `size` rows into which the tile is cut from its last row on. That of its first rows may
  /// have fewer, and those after that have none.
  FLASHCUTE_HD QueryTile part_from_end(int32_t i, int32_t size) const {
    int32_t const end = row0 + rows - i * size;
    QueryTile part = *this;
    part.row0 = max_of(row0, end - size);
    part.rows = end - part.row0;
    return part;
  }

  FLASHCUTE_HD static int64_t count(ForwardParams const& p, int32_t block_m) {
    return static_cast<int64_t>(p.batch) * p.heads * ceil_div<int64_t>(p.seqlen_q, block_m);
  }

  /// Where the counts of the tile, or of the one of which this is a part, lie; whether tiles are cut from the first
  /// row on or from the last.
  FLASHCUTE_HD int64_t block_counts_offset(ForwardParams const& p, int32_t block_m) const {
    int64_t const heads_to_here = static_cast<int64_t>(batch) * p.heads + head + 1;
    return heads_to_here * ceil_div(p.seqlen_q, block_m) - ceil_div(p.seqlen_q - row0, block_m);
  }

  FLASHCUTE_HD int64_t q_offset(ForwardParams const& p) const { return row_offset(p.q_stride, batch, head, row0); }
  FLASHCUTE_HD int64_t k_offset(ForwardParams const& p) const { return row_offset(p.k_stride, batch, kv_head, 0); }
  FLASHCUTE_HD int64_t v_offset(ForwardParams const& p) const { return row_offset(p.v_stride, batch, kv_head, 0); }
  FLASHCUTE_HD int64_t out_offset(ForwardParams const& p) const { return row_offset(p.out_stride, batch, head, row0); }
  FLASHCUTE_HD int64_t lse_offset(ForwardParams const& p) const {
    return (static_cast<int64_t>(batch) * p.heads + head) * p.seqlen_q + row0;
  }
};

}  // namespace flashcute
