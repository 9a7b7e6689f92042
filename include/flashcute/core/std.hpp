// The only header of the device code that includes standard headers. NVRTC has none of them, so libcu++ takes their
// place there; all other headers write `flashcute::int64_t` and the like.
#pragma once

#if defined(__CUDACC_RTC__)
#include <cuda/std/cstddef>
#include <cuda/std/cstdint>
#include <cuda/std/limits>
#include <cuda/std/type_traits>
#else
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#endif

// FLASHCUTE_DEVICE marks device code; the host compiles it only in tests that emulate a thread block. FLASHCUTE_HD
// marks functions that host and device share. On the host they are always inlined: the CPU backend compiles the same
// code once per instruction set, and the linker could otherwise keep the copy built for AVX-512 for all of them.
#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define FLASHCUTE_HD __host__ __device__ __forceinline__
#define FLASHCUTE_DEVICE __device__ __forceinline__
#else
#define FLASHCUTE_HD [[gnu::always_inline]] inline
#define FLASHCUTE_DEVICE inline
#endif

namespace flashcute {

#if defined(__CUDACC_RTC__)
namespace std_ = ::cuda::std;
#else
namespace std_ = ::std;
#endif

using std_::int32_t;
using std_::int64_t;
using std_::size_t;
using std_::uint16_t;
using std_::uint32_t;
using std_::uint64_t;
using std_::uint8_t;

inline constexpr float infinity = std_::numeric_limits<float>::infinity();
inline constexpr float smallest_normal = std_::numeric_limits<float>::min();

template <class T>
FLASHCUTE_HD constexpr T min_of(T a, T b) {
  return b < a ? b : a;
}

template <class T>
FLASHCUTE_HD constexpr T max_of(T a, T b) {
  return a < b ? b : a;
}

template <class T>
FLASHCUTE_HD constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace flashcute
