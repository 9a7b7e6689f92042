// What one backward pass needs to know: plain data, as params.hpp for the forward.
#pragma once

#include "flashcute/params.hpp"

namespace flashcute {

struct BackwardParams {
  ForwardParams forward;  // of the call whose gradients these are; out and lse are read

  void const* dout;  // (batch, seqlen_q, heads,    head_dim_v)
  void const* dlse;  // (batch, heads, seqlen_q), of lse's type; null: the LSE was not used
  void* dq;          // (batch, seqlen_q, heads,    head_dim)
  void* dk;          // (batch, seqlen_k, kv_heads, head_dim): sums over the query heads of a group
  void* dv;          // (batch, seqlen_k, kv_heads, head_dim_v): the same
  void* delta;       // (batch, heads, seqlen_q), contiguous, of lse's type: rowsum(dO * O) - dLSE, a workspace
  void* dq_sums;     // fp32: dq / scale, tile by tile of block_m x head_dim (of the configuration), in an order that
                     // `gradients` and `finish` agree on; a workspace; null for those who do without

  Strides dout_stride, dlse_stride, dq_stride, dk_stride, dv_stride;
};

// The host (g++) fills the struct, the device compiler reads it: both assert the layout.
static_assert(sizeof(BackwardParams) == 368);
#if !defined(__CUDACC_RTC__)  // NVRTC's offsetof is no constant expression
static_assert(offsetof(BackwardParams, dout) == 192);
static_assert(offsetof(BackwardParams, delta) == 232);
static_assert(offsetof(BackwardParams, dout_stride) == 248);
static_assert(offsetof(BackwardParams, dv_stride) == 344);
#endif

/// One block of keys of one K/V head: a task that owns its rows of dK and dV, for all query heads of the group.
struct KeyTile {
  int32_t batch, kv_head;
  int32_t row0;  // first key
  int32_t rows;  // keys that exist: block_keys, or fewer at the end of the sequence

  static constexpr int64_t cache_bytes = 32 << 20;

  /// Tile `index` of `count(p, block_keys)`. Under a causal mask most queries see the first keys, and the long tiles
  /// should start early: of several heads all first tiles come first. Of so many heads that what passes by their tiles
  /// (Q, dO and the sums of dQ) stays in a level 2 cache.
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
    t.batch = static_cast<int32_t>(head_index / p.kv_heads);
    t.kv_head = static_cast<int32_t>(head_index % p.kv_heads);
    t.row0 = static_cast<int32_t>(place / width) * block_keys;
    t.rows = min_of(block_keys, p.seqlen_k - t.row0);
    return t;
  }

  FLASHCUTE_HD static int64_t count(ForwardParams const& p, int32_t block_keys) {
    return static_cast<int64_t>(p.batch) * p.kv_heads * ceil_div<int64_t>(p.seqlen_k, block_keys);
  }
};

}  // namespace flashcute
