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

  Strides dout_stride, dlse_stride, dq_stride, dk_stride, dv_stride;
};

// The host (g++) fills the struct, the device compiler reads it: both assert the layout.
static_assert(sizeof(BackwardParams) == 360);
#if !defined(__CUDACC_RTC__)  // NVRTC's offsetof is no constant expression
static_assert(offsetof(BackwardParams, dout) == 192);
static_assert(offsetof(BackwardParams, delta) == 232);
static_assert(offsetof(BackwardParams, dout_stride) == 240);
static_assert(offsetof(BackwardParams, dv_stride) == 336);
#endif

/// One block of keys of one K/V head: a task that owns its rows of dK and dV, for all query heads of the group.
struct KeyTile {
  int32_t batch, kv_head;
  int32_t row0;  // first key
  int32_t rows;  // keys that exist: block_keys, or fewer at the end of the sequence

  /// Tile `index` of `count(p, block_keys)`. Within a head the first keys come first: under a causal mask most
  /// queries see them, and the long tasks should start early.
  FLASHCUTE_HD static KeyTile at(ForwardParams const& p, int64_t index, int32_t block_keys) {
    int64_t const blocks = ceil_div<int64_t>(p.seqlen_k, block_keys);
    int64_t const head_index = index / blocks;
    KeyTile t;
    t.batch = static_cast<int32_t>(head_index / p.kv_heads);
    t.kv_head = static_cast<int32_t>(head_index % p.kv_heads);
    t.row0 = static_cast<int32_t>(index % blocks) * block_keys;
    t.rows = min_of(block_keys, p.seqlen_k - t.row0);
    return t;
  }

  FLASHCUTE_HD static int64_t count(ForwardParams const& p, int32_t block_keys) {
    return static_cast<int64_t>(p.batch) * p.kv_heads * ceil_div<int64_t>(p.seqlen_k, block_keys);
  }
};

}  // namespace flashcute
