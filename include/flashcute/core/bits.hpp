// Bits of words.
#pragma once

#include "flashcute/core/std.hpp"

namespace flashcute {

/// The lowest `count` bits set; any `count` is allowed.
FLASHCUTE_HD uint32_t low_bits(int32_t count) { return count >= 32 ? ~0u : (1u << max_of(count, 0)) - 1; }
FLASHCUTE_HD uint64_t low_bits64(int32_t count) {
  return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << max_of(count, 0)) - 1;
}

/// Which bytes of a word are not 0: bit i of the result tells of byte i.
template <class Word>
FLASHCUTE_HD constexpr Word nonzero_bytes(Word word) {
  constexpr int bytes = sizeof(Word);
  constexpr Word each = ~Word{0} / 255;  // 1 in each byte
  Word const highest = (((word & each * 0x7f) + each * 0x7f) | word) & each * 0x80;
  // The sum of 2^(7 k) for k below `bytes`: that of bytes - 1 - i moves bit 8 i + 7 to bit 7 * bytes + i.
  constexpr Word shifts = ((Word{1} << 7 * bytes) - 1) / 127;
  return highest * shifts >> 7 * bytes;
}

/// How many bits are set.
FLASHCUTE_HD int32_t count_bits(uint32_t x) {
#if defined(__CUDA_ARCH__)
  return __popc(x);
#else
  return __builtin_popcount(x);
#endif
}

/// The number of the highest bit that is set, and of the lowest; of a word that is not 0.
FLASHCUTE_HD int32_t highest_bit(uint32_t x) {
#if defined(__CUDA_ARCH__)
  return 31 - __clz(static_cast<int>(x));
#else
  return 31 - __builtin_clz(x);
#endif
}
FLASHCUTE_HD int32_t lowest_bit(uint32_t x) {
#if defined(__CUDA_ARCH__)
  return __ffs(static_cast<int>(x)) - 1;
#else
  return __builtin_ctz(x);
#endif
}

}  // namespace flashcute
