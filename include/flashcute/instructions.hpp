// What the hardware does for us (compute capability 8.0): the instructions that the kernels are made of,
// by name. All inline PTX and all choices of CuTe atoms are here; everything above is C++. The tests put
// a header of the same name in this one's place, to run whole kernels on the host.
#pragma once

#include <cute/tensor.hpp>
// CuTe's atoms need its tensor first.
#include <cute/atom/copy_atom.hpp>
#include <cute/atom/mma_atom.hpp>

#include "flashcute/config.hpp"

namespace flashcute {

// ---- copies and products, as CuTe operations -----------------------------------------------------

/// 16 bytes from global to shared memory, asynchronously; zeros where the predicate is false.
using CpAsync = cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>;
/// Four 8x8 tiles of 16-bit elements from shared memory to the lanes of a warp.
using Ldmatrix = cute::SM75_U32x4_LDSM_N;
/// The same, each tile transposed.
using LdmatrixTransposed = cute::SM75_U16x8_LDSM_T;
/// Two neighbouring 16-bit elements of an accumulator from registers to shared memory.
using FragmentStore = cute::UniversalCopy<cute::uint32_t>;
/// 16 bytes from shared to global memory.
using VectorCopy = cute::UniversalCopy<cute::uint128_t>;

template <DType>
struct TensorCore;

template <>
struct TensorCore<DType::float16> {
  using Element = cute::half_t;
  using Mma = cute::SM80_16x8x16_F32F16F16F32_TN;  // mma.sync.m16n8k16, fp32 accumulators
};

template <>
struct TensorCore<DType::bfloat16> {
  using Element = cute::bfloat16_t;
  using Mma = cute::SM80_16x8x16_F32BF16BF16F32_TN;
};

// ---- threads -------------------------------------------------------------------------------------

FLASHCUTE_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }

FLASHCUTE_DEVICE uint32_t block_index() { return blockIdx.x; }

/// All threads of the block arrive, and see what the others wrote to shared memory.
FLASHCUTE_DEVICE void block_sync() { __syncthreads(); }

/// block_sync that also tells whether any thread passed true.
FLASHCUTE_DEVICE bool block_any(bool x) { return __syncthreads_or(x); }

/// One word from or to shared memory.
template <class Word>
FLASHCUTE_DEVICE Word shared_load(void const* from) {
  return *static_cast<Word const*>(from);
}

template <class Word>
FLASHCUTE_DEVICE void shared_store(void* to, Word const& word) {
  *static_cast<Word*>(to) = word;
}

/// The value of the lane whose number differs by `mask`.
FLASHCUTE_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

/// Waits for all asynchronous copies of this thread.
FLASHCUTE_DEVICE void copies_wait() { cute::cp_async_wait<0>(); }

// ---- arithmetic ----------------------------------------------------------------------------------

/// 2^x by the special-function unit; 2^-inf = 0, NaN stays NaN.
FLASHCUTE_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// 1 / x by the special-function unit; 1 / 0 = inf.
FLASHCUTE_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Two floats rounded to nearest even and packed, `low` in the lower half.
template <class To>
FLASHCUTE_DEVICE uint32_t round_pair(float low, float high) {
  uint32_t packed;
  if constexpr (std_::is_same_v<To, cute::half_t>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    static_assert(std_::is_same_v<To, cute::bfloat16_t>);
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

/// sum + 0 * pair, in both halves: a half of the sum turns NaN at the first half that is not finite.
template <class Element>
FLASHCUTE_DEVICE uint32_t add_zero_times(uint32_t pair, uint32_t sum) {
  uint32_t result;
  if constexpr (std_::is_same_v<Element, cute::half_t>) {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(pair), "r"(0u), "r"(sum));
  } else {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(pair), "r"(0u), "r"(sum));
  }
  return result;
}

}  // namespace flashcute
