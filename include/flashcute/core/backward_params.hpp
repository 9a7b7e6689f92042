// The parameters of one backward pass: plain data, as forward_params.hpp for the forward.
#pragma once

#include "flashcute/core/forward_params.hpp"

namespace flashcute {

struct BackwardParams {
  ForwardParams forward;  // of the call whose gradients these are; out and lse are read

  void const* dout;  // (batch, seqlen_q, heads,    head_dim_v)
  void const* dlse;  // (batch, heads, seqlen_q), of lse's type; null: the LSE was not used
  void* dq;          // (batch, seqlen_q, heads,    head_dim)
  void* dk;          // (batch, seqlen_k, kv_heads, head_dim): sums over the query heads of a group
  void* dv;          // (batch, seqlen_k, kv_heads, head_dim_v): the same
  void* delta;       // (batch, heads, seqlen_q), contiguous, of lse's type: rowsum(dO * O) - dLSE, a workspace; of
                     // Hopper's kernels the base-2 LSE and then delta, with whole tiles of block_m queries
  void* dq_sums;     // fp32: dq / scale in tiles of block_m x head_dim (of the configuration), whose element order only
                     // `gradients` and `finish` know; a workspace; null if deterministic (but of Hopper's kernels
                     // followed by counters), and on the CPU
  void* dsink;       // (heads,), of the sink's type; null: not wanted

  Strides dout_stride, dlse_stride, dq_stride, dk_stride, dv_stride;
};

// The host compiler and the device compiler have to agree on the layout: the assertions run in both.
static_assert(sizeof(BackwardParams) == 576);
#if !defined(__CUDACC_RTC__)  // NVRTC's offsetof is no constant expression
static_assert(offsetof(BackwardParams, dout) == 392);
static_assert(offsetof(BackwardParams, delta) == 432);
static_assert(offsetof(BackwardParams, dout_stride) == 456);
static_assert(offsetof(BackwardParams, dv_stride) == 552);
#endif

}  // namespace flashcute
