// Vectors as wide as the instruction set that this file is compiled for, as GCC vector extensions: arithmetic,
// comparison and `mask ? a : b` work lane by lane. Everything has internal linkage, because the same names exist once
// per instruction set (see forward_impl.hpp).
#pragma once

#include "flashcute/core/std.hpp"

#if defined(__F16C__)
#include <immintrin.h>
#endif

#if !defined(FLASHCUTE_CPU_ISA)
#define FLASHCUTE_CPU_ISA baseline
#endif

namespace flashcute::cpu::FLASHCUTE_CPU_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
constexpr int vector_registers = 32;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
constexpr int vector_registers = 16;
#elif defined(__aarch64__)
constexpr int vector_bytes = 16;
constexpr int vector_registers = 32;
#else
constexpr int vector_bytes = 16;
constexpr int vector_registers = 16;
#endif

template <class T>
struct FloatTraits;

template <>
struct FloatTraits<float> {
  using Int = int32_t;
  static constexpr int mantissa_bits = 23;
  static constexpr Int exponent_bias = 127;
  static constexpr float round_to_int = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  // (2^f - 1) / f on |f| <= 1/2, minimax: relative error of 2^f 2.6e-9, and 2^0 is exactly 1.
  static constexpr float exp2_coefficients[] = {0x1.62e432p-1f, 0x1.ebfbe2p-3f,  0x1.c6ae72p-5f,
                                                0x1.3b270ep-7f, 0x1.5f7278p-10f, 0x1.470b50p-13f};
};

template <>
struct FloatTraits<double> {
  using Int = int64_t;
  static constexpr int mantissa_bits = 52;
  static constexpr Int exponent_bias = 1023;
  static constexpr double round_to_int = 0x1.8p52;
  // As above, relative error 1.8e-17.
  static constexpr double exp2_coefficients[] = {0x1.62e42fefa39f3p-1,  0x1.ebfbdff82c598p-3,  0x1.c6b08d7048f30p-5,
                                                 0x1.3b2ab6fba1e1cp-7,  0x1.5d87fe7bbc07ep-10, 0x1.4309130961210p-13,
                                                 0x1.ffcbee3a4c898p-17, 0x1.62bfd49eb7facp-20, 0x1.b5416923e760bp-24,
                                                 0x1.e605f99f6daa1p-28, 0x1.c0615294089c9p-32};
};

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(vector_bytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
constexpr int lanes = vector_bytes / static_cast<int>(sizeof(T));

template <class T>
[[gnu::always_inline]] inline Vector<T> broadcast(T x) {
  return x - Vector<T>{};  // x - 0 is x, also for -0, infinities and NaN
}

/// `p` is aligned to a vector.
template <class T>
[[gnu::always_inline]] inline Vector<T> load(T const* p) {
  return *reinterpret_cast<Vector<T> const*>(p);
}

template <class T>
[[gnu::always_inline]] inline void store(T* p, Vector<T> x) {
  *reinterpret_cast<Vector<T>*>(p) = x;
}

/// Some of a vector's lanes: all bits of their elements are set, none of the others. `mask ? x : y` selects by it.
template <class T>
using LaneMask = Vector<typename FloatTraits<T>::Int>;

/// Those of which a bit is set: lane i has bit i.
template <class T>
[[gnu::always_inline]] inline LaneMask<T> lanes_of_bits(uint64_t bits) {
  using Int = typename FloatTraits<T>::Int;
  LaneMask<T> bit_of_lane;
#pragma GCC unroll 16
  for (int i = 0; i < lanes<T>; ++i) bit_of_lane[i] = Int{1} << i;  // constants
  return (bit_of_lane & static_cast<Int>(bits)) != 0;
}

/// 2^x with a relative error of about one rounding. 2^-inf = 0, NaN stays NaN, and results below the
/// smallest normal number are 0. Meant for x <= 0: for a large x the result is meaningless, not inf.
template <class T>
[[gnu::always_inline]] inline Vector<T> exp2(Vector<T> x) {
  using Traits = FloatTraits<T>;
  using Ints = Vector<typename Traits::Int>;
  // Written so that NaN survives. At the bound the exponent field is 0: the scale below is exactly 0.
  Vector<T> const bound = broadcast(static_cast<T>(-Traits::exponent_bias));
  x = bound > x ? bound : x;
  Vector<T> const shifted = x + Traits::round_to_int;
  Vector<T> const f = x - (shifted - Traits::round_to_int);
  constexpr int terms = sizeof(Traits::exp2_coefficients) / sizeof(T);
  Vector<T> y = broadcast(Traits::exp2_coefficients[terms - 1]);
#pragma GCC unroll 16
  for (int i = terms - 2; i >= 0; --i) y = y * f + Traits::exp2_coefficients[i];
  y = y * f + T{1};
  // The low bits of `shifted` hold round(x); the shift pushes everything else out.
  Ints const scale =
      (reinterpret_cast<Ints>(shifted) << Traits::mantissa_bits) + (Traits::exponent_bias << Traits::mantissa_bits);
  return y * reinterpret_cast<Vector<T>>(scale);
}

// ---- 16-bit floating point as bits: g++ 12 has no __bf16, and baseline x86 converts no halves -----

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

[[gnu::always_inline]] inline float to_float(Bfloat16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}

[[gnu::always_inline]] inline float to_float(Half x) {
  uint32_t const sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  uint32_t const magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  // Read with fp32's exponent bias the value is 2^112 too small; a subnormal half becomes
  // (2^-14 + value) - 2^-14, which needs no subnormal arithmetic.
  uint32_t const rebias = 112u << 23;
  float const subnormal = __builtin_bit_cast(float, magnitude + rebias + (1u << 23)) - 0x1p-14f;
  uint32_t const normal = magnitude + rebias + (magnitude >= (31u << 23) ? rebias : 0u);  // inf and NaN: twice
  uint32_t const bits = magnitude < (1u << 23) ? __builtin_bit_cast(uint32_t, subnormal) : normal;
  return __builtin_bit_cast(float, bits | sign);
}

/// Round to nearest even; NaN stays NaN.
[[gnu::always_inline]] inline void from_float(float x, Bfloat16& to) {
  uint32_t const bits = __builtin_bit_cast(uint32_t, x);
  uint32_t const rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  uint32_t const quiet_nan = (bits >> 16) | 0x40;
  to.bits = static_cast<uint16_t>(x == x ? rounded : quiet_nan);
}

[[gnu::always_inline]] inline void from_float(float x, Half& to) {
  uint32_t const bits = __builtin_bit_cast(uint32_t, x);
  uint32_t const magnitude = bits & 0x7fffffff;
  // Adding 1/2 leaves a subnormal half, rounded, in the low bits of the sum.
  uint32_t const subnormal =
      __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) + 0.5f) - __builtin_bit_cast(uint32_t, 0.5f);
  uint32_t const normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  uint32_t const rounded = magnitude < (113u << 23) ? subnormal : magnitude < 0x477ff000 ? normal : 0x7c00;
  to.bits = static_cast<uint16_t>((x == x ? rounded : 0x7e00) | ((bits >> 16) & 0x8000));
}

[[gnu::always_inline]] inline float to_float(float x) { return x; }
[[gnu::always_inline]] inline double to_float(double x) { return x; }
[[gnu::always_inline]] inline void from_float(float x, float& to) { to = x; }
[[gnu::always_inline]] inline void from_float(double x, double& to) { to = x; }

/// to[i] = from[i] for i < n, widened.
template <class Element, class T>
[[gnu::always_inline]] inline void widen(Element const* from, T* to, int n) {
  int i = 0;
#if defined(__F16C__)
  if constexpr (__is_same(Element, Half)) {
    for (; i + 8 <= n; i += 8) {
      __m128i const halves = _mm_loadu_si128(reinterpret_cast<__m128i const*>(from + i));
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
    }
  }
#endif
  for (; i < n; ++i) to[i] = to_float(from[i]);
}

}  // namespace
}  // namespace flashcute::cpu::FLASHCUTE_CPU_ISA
