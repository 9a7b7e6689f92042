// The instructions of compute capability 8.0 that the kernels are made of, by name. All inline PTX is here and in
// sm90/instructions.hpp, and the CuTe atoms of the sm80 kernels are chosen here; the other headers are plain C++. To
// run whole kernels on the host, the tests substitute a header of the same name.
#pragma once

// Only the parts of CuTe that are used: cute/tensor.hpp includes every atom of every GPU, a third of a kernel's compile
// time.
#include <cute/tensor_impl.hpp>
// These headers do not compile unless the tensor comes first.
#include <cute/algorithm/clear.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/pointer_flagged.hpp>
#include <cute/pointer_swizzle.hpp>
#include <cute/swizzle_layout.hpp>

#include "flashcute/core/forward_config.hpp"

namespace flashcute {

// ---- fragments and products, as CuTe operations --------------------------------------------------

/// mma.sync with fp32 accumulators. `Element` is the type in memory, `Operand` the one that is multiplied.
template <DType>
struct TensorCore;

template <>
struct TensorCore<DType::float16> {
  using Element = cute::half_t;
  using Operand = Element;
  using Mma = cute::SM80_16x8x16_F32F16F16F32_TN;  // mma.sync.m16n8k16
};

template <>
struct TensorCore<DType::bfloat16> {
  using Element = cute::bfloat16_t;
  using Operand = Element;
  using Mma = cute::SM80_16x8x16_F32BF16BF16F32_TN;
};

template <>
struct TensorCore<DType::float32> {
  using Element = float;
  using Operand = cute::tfloat32_t;
  using Mma = cute::SM80_16x8x8_F32TF32TF32F32_TN;  // mma.sync.m16n8k8
};

// ---- memory --------------------------------------------------------------------------------------

/// An address in shared memory as a number, to compute with.
using SharedAddress = uint32_t;

FLASHCUTE_DEVICE SharedAddress shared_address(void const* p) { return cute::cast_smem_ptr_to_uint(p); }

/// The same address, opaque to the compiler, so that what is computed from it is computed where it is written.
/// Otherwise nvcc hoists all loop-invariant addresses out of the loop, and the registers that hold them spill.
FLASHCUTE_DEVICE SharedAddress computed_here(SharedAddress address) {
  asm volatile("" : "+r"(address));
  return address;
}

/// Loads four 8x8 tiles of 16-bit elements (8x4 of 32-bit ones) from shared memory into the registers of a warp: lane i
/// passes the address of row i % 8 of tile i / 8. With `Transposed` each tile, of 16-bit elements, arrives transposed.
template <bool Transposed>
FLASHCUTE_DEVICE void ldmatrix(SharedAddress row, uint32_t& d0, uint32_t& d1, uint32_t& d2, uint32_t& d3) {
  if constexpr (Transposed) {
    asm volatile("ldmatrix.sync.aligned.x4.trans.m8n8.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d0), "=r"(d1), "=r"(d2), "=r"(d3)
                 : "r"(row));
  } else {
    asm volatile("ldmatrix.sync.aligned.x4.m8n8.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d0), "=r"(d1), "=r"(d2), "=r"(d3)
                 : "r"(row));
  }
}

/// A float from shared memory.
FLASHCUTE_DEVICE float shared_load_at(SharedAddress from) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(from));
  return x;
}

/// One word from or to shared memory.
template <class Word>
FLASHCUTE_DEVICE Word shared_load(void const* from) {
  return *static_cast<Word const*>(from);
}

template <class Word>
FLASHCUTE_DEVICE void shared_store(void* to, Word const& word) {
  *static_cast<Word*>(to) = word;
}

/// One word from or to global memory.
template <class Word>
FLASHCUTE_DEVICE Word global_load(void const* from) {
  return *static_cast<Word const*>(from);
}

template <class Word>
FLASHCUTE_DEVICE void global_store(void* to, Word const& word) {
  *static_cast<Word*>(to) = word;
}

/// Floats that one instruction adds to global memory at once.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
inline constexpr int reduction_width = 4;
#else
inline constexpr int reduction_width = 1;
#endif

/// Adds to a number in global memory, atomically; returns what it was.
FLASHCUTE_DEVICE uint32_t count_up(uint32_t* number, uint32_t by) { return atomicAdd(number, by); }

/// Adds Width (reduction_width) floats to those at `to`, each atomically.
template <int Width>
FLASHCUTE_DEVICE void reduce_add(float* to, float const* x) {
  if constexpr (Width == 4) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]),
                 "f"(x[3])
                 : "memory");
  } else {
    static_assert(Width == 1);
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(to), "f"(x[0]) : "memory");
  }
}

/// Starts copying one word (4, 8 or 16 bytes) from global to shared memory; writes zeros if it does not exist.
template <class Word>
FLASHCUTE_DEVICE void copy_async(void const* from, void* to, bool exists) {
  static_assert(sizeof(Word) == 4 || sizeof(Word) == 8 || sizeof(Word) == 16);
  uint32_t const shared = cute::cast_smem_ptr_to_uint(to);
  int const bytes = exists ? static_cast<int>(sizeof(Word)) : 0;
  if constexpr (sizeof(Word) == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(from), "n"(sizeof(Word)), "r"(bytes)
                 : "memory");
  }
}

/// The compiler does not move later loads from shared memory above this.
FLASHCUTE_DEVICE void keep_loads_behind() { __syncwarp(); }

/// Waits for all asynchronous copies of this thread.
FLASHCUTE_DEVICE void copies_wait() { cute::cp_async_wait<0>(); }

// ---- threads -------------------------------------------------------------------------------------

FLASHCUTE_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }

FLASHCUTE_DEVICE uint32_t block_index() { return blockIdx.x; }

/// Barrier of all threads of the block; after it each sees what the others wrote to shared memory.
FLASHCUTE_DEVICE void block_sync() { __syncthreads(); }

/// block_sync that also returns whether any thread passed true.
FLASHCUTE_DEVICE bool block_any(bool x) { return __syncthreads_or(x); }

/// The value of the lane whose number differs in the bits of `mask`.
FLASHCUTE_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
FLASHCUTE_DEVICE uint32_t shuffle_xor_word(uint32_t word, int mask) { return __shfl_xor_sync(0xffffffffu, word, mask); }

/// Whether any lane of the warp passed true.
FLASHCUTE_DEVICE bool warp_any(bool x) { return __any_sync(0xffffffffu, x); }

/// A bit for each lane of the warp: whether its x is true.
FLASHCUTE_DEVICE uint32_t lanes_with(bool x) { return __ballot_sync(0xffffffffu, x); }

/// The least and the greatest of the warp's numbers.
FLASHCUTE_DEVICE int32_t warp_least(int32_t x) { return __reduce_min_sync(0xffffffffu, x); }
FLASHCUTE_DEVICE int32_t warp_greatest(int32_t x) { return __reduce_max_sync(0xffffffffu, x); }

/// The value of lane `lane` within this thread's group of `Width` lanes.
template <int Width>
FLASHCUTE_DEVICE float shuffle(float x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane, Width);
}

// ---- arithmetic ----------------------------------------------------------------------------------

/// 2^x by the special-function unit; 2^-inf = 0, NaN stays NaN.
FLASHCUTE_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// The greater of two; NaN if either is NaN.
FLASHCUTE_DEVICE float max_or_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
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

/// The minimum of each element in the word and 1; NaN stays NaN.
template <class Element>
FLASHCUTE_DEVICE uint32_t at_most_one(uint32_t word) {
  uint32_t result;
  if constexpr (std_::is_same_v<Element, float>) {
    asm("min.NaN.f32 %0, %1, %2;" : "=r"(result) : "r"(word), "r"(0x3f800000u));
  } else if constexpr (std_::is_same_v<Element, cute::half_t>) {
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(word), "r"(0x3c003c00u));
  } else {
    static_assert(std_::is_same_v<Element, cute::bfloat16_t>);
    asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(word), "r"(0x3f803f80u));
  }
  return result;
}

/// x rounded to nearest in TF32, half away from zero; but a finite x does not become infinity: 0 * infinity would be
/// NaN.
FLASHCUTE_DEVICE cute::tfloat32_t round_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  if ((bits & 0x7fffffffu) == 0x7f800000u) bits = __float_as_uint(x);  // the tensor cores truncate it
  return cute::tfloat32_t::bitcast(bits);
}

/// x truncated to TF32.
FLASHCUTE_DEVICE cute::tfloat32_t truncate_tf32(float x) {
  return cute::tfloat32_t::bitcast(__float_as_uint(x) & 0xffffe000u);
}

/// x as an operand: the tensor cores read only its upper bits.
FLASHCUTE_DEVICE cute::tfloat32_t as_tf32(float x) { return cute::tfloat32_t::bitcast(__float_as_uint(x)); }

/// sum + 0 * word, for each element in the word: a sum turns NaN at the first element that is not finite.
template <class Element>
FLASHCUTE_DEVICE uint32_t add_zero_times(uint32_t word, uint32_t sum) {
  uint32_t result;
  if constexpr (std_::is_same_v<Element, float>) {
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=r"(result) : "r"(word), "r"(0u), "r"(sum));
  } else if constexpr (std_::is_same_v<Element, cute::half_t>) {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(word), "r"(0u), "r"(sum));
  } else {
    static_assert(std_::is_same_v<Element, cute::bfloat16_t>);
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(word), "r"(0u), "r"(sum));
  }
  return result;
}

}  // namespace flashcute
