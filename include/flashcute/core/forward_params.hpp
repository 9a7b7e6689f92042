// The parameters of one launch of the forward: plain data, passed by value as the sm80 kernel's only parameter, as a
// part of Hopper's, and to the CPU backend.
#pragma once

#include "flashcute/core/block_map.hpp"

namespace flashcute {

/// Distances between neighbours, in elements. The last dimension always has stride 1.
struct Strides {
  int64_t batch, row, head;
};

/// How a tile of query rows treated the K/V blocks of its sequence.
struct BlockCounts {
  int32_t full;     // visited, without a test of elements
  int32_t partial;  // visited, with one
  int32_t skipped;  // never touched
};

/// Offset of the first element of a row.
FLASHCUTE_HD int64_t row_offset(Strides const& s, int64_t batch, int64_t head, int64_t row) {
  return batch * s.batch + head * s.head + row * s.row;
}

/// The place and the lengths of each batch entry, and what its queries see beside the band of keys about the diagonal.
struct SequenceParams {
  static constexpr int32_t no_prefix = std_::numeric_limits<int32_t>::max();

  int32_t const *seqlens_q = nullptr, *seqlens_k = nullptr;  // (batch,): how many rows exist; null: all
  // A query sees no key that is neither before `prefix` nor up to i + prefix_offset. prefixes: (batch,), or null: one
  // number for all.
  int32_t const* prefixes = nullptr;
  int32_t prefix = no_prefix;
  int32_t prefix_offset = 0;
  bool from_end = false;  // the offsets are those of tensors without seqlens, and move with the ends of what exists
  uint8_t reserved[3] = {};
  // Packed: tensors without a batch dimension, in which `count` sequences lie one after the other. A batch entry is a
  // sequence: sequence i has the rows from cu_seqlens[i] up to cu_seqlens[i + 1], of which `seqlens` says how many
  // exist. To the launch the tensors are a batch of one, of seqlen_q and seqlen_k rows. Null: not packed.
  int32_t count = 0;
  int32_t const *cu_seqlens_q = nullptr, *cu_seqlens_k = nullptr;  // (count + 1,)

  FLASHCUTE_HD bool packed() const { return cu_seqlens_q != nullptr; }
};

/// A logit of each query head that takes part in the softmax with value 0.
struct SinkParams {
  void const* logits;  // (heads,), contiguous; null: none
  bool float32;        // else of q's dtype
  uint8_t reserved[7];
};

struct ForwardParams {
  void const* q;              // (batch, seqlen_q, heads,    head_dim)
  void const* k;              // (batch, seqlen_k, kv_heads, head_dim)
  void const* v;              // (batch, seqlen_k, kv_heads, head_dim_v)
  void* out;                  // (batch, seqlen_q, heads,    head_dim_v)
  void* lse;                  // (batch, heads, seqlen_q), contiguous; fp32, or fp64 with fp64 inputs; may be null
  BlockCounts* block_counts;  // (batch, heads, row blocks), packed (heads, slots); null unless Features::count_blocks

  Strides q_stride, k_stride, v_stride, out_stride;

  double scale;      // of the scores: softmax(scale * Q K^T)
  float scale_log2;  // scale * log2(e), for the base-2 softmax of the GPU kernels

  int32_t batch, heads, kv_heads;
  int32_t seqlen_q, seqlen_k;
  int32_t head_dim, head_dim_v;
  // From -seqlen_q to seqlen_k, beyond which they show or hide nothing more: so the sum with a query's number fits 32
  // bits. Any numbers where sequences may be shorter than the tensors: BatchSequence holds the sums with the difference
  // within the sequence's own lengths.
  int32_t causal_offset;  // causal: query i sees key j iff j <= i + causal_offset
  int32_t window_offset;  // band: iff also i + window_offset <= j

  SequenceParams sequences;  // band, mapped
  SinkParams sink;           // band, mapped
  BlockMapParams map;        // mapped
};

// The host compiler and the device compiler have to agree on the layout: the assertions run in both.
static_assert(sizeof(Strides) == 24);
static_assert(sizeof(BlockCounts) == 12);
static_assert(sizeof(SequenceParams) == 56);
static_assert(sizeof(SinkParams) == 16);
static_assert(sizeof(BlockMapParams) == 128);
static_assert(sizeof(ForwardParams) == 392);
#if !defined(__CUDACC_RTC__)  // NVRTC's offsetof is no constant expression
static_assert(offsetof(ForwardParams, q_stride) == 48);
static_assert(offsetof(ForwardParams, out_stride) == 120);
static_assert(offsetof(ForwardParams, scale) == 144);
static_assert(offsetof(ForwardParams, batch) == 156);
static_assert(offsetof(ForwardParams, causal_offset) == 184);
static_assert(offsetof(ForwardParams, window_offset) == 188);
static_assert(offsetof(ForwardParams, sequences) == 192);
static_assert(offsetof(ForwardParams, sink) == 248);
static_assert(offsetof(ForwardParams, map) == 264);
#endif

/// Offset of the LSE of a head's first query in a contiguous tensor of (batch, heads, seqlen_q); of its delta too.
FLASHCUTE_HD int64_t lse_offset(ForwardParams const& p, int32_t batch, int32_t head) {
  return (static_cast<int64_t>(batch) * p.heads + head) * p.seqlen_q;
}

}  // namespace flashcute
