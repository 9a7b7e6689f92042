// NaN and infinity in V that only some rows of a tile see. In O += P V an invisible value is multiplied by
// 0, which is as good as leaving it out while it is finite; but 0 * NaN is NaN. So before a product in
// which rows see different keys, the block looks whether V is finite. If it is not, every row adds what it
// sees of the values that are not, and these are replaced by 0 before the product.
#pragma once

#include "flashcute/fragment.hpp"

namespace flashcute {

/// Tells NaN and infinity by the bits of a 16-bit float.
template <class Element>
struct NonFinite {
  /// All 1 in NaN and infinity, and in nothing else.
  static constexpr uint32_t exponent = std_::is_same_v<Element, cute::half_t> ? 0x7c00 : 0x7f80;

  FLASHCUTE_DEVICE static bool in_low_half(uint32_t pair) { return (pair & exponent) == exponent; }
  FLASHCUTE_DEVICE static bool in_high_half(uint32_t pair) { return in_low_half(pair >> 16); }

  /// What 1 * x adds to a sum for an x that is not finite.
  FLASHCUTE_DEVICE static float value(uint32_t bits) {
    float const size = (bits & 0x7fff) > exponent ? infinity - infinity : infinity;
    return (bits & 0x8000) != 0 ? -size : size;
  }
};

/// 16 bytes of shared memory.
struct alignas(16) SharedWords {
  uint32_t word[4];
};

/// Calls f(place) for each 16 bytes of `count` 16-bit elements of shared memory that are this thread's part.
template <int Threads, class Element, class F>
FLASHCUTE_DEVICE void for_each_shared_words(Element* elements, int count, F const& f) {
  for (int i = 8 * thread_index(); i < count; i += 8 * Threads) f(elements + i);
}

/// Whether `count` elements of shared memory are all finite. All threads of the block call it.
template <int Threads, class Element>
FLASHCUTE_DEVICE bool block_all_finite(Element* elements, int count) {
  uint32_t sum = 0;
  for_each_shared_words<Threads>(elements, count, [&](Element* place) {
    auto const words = shared_load<SharedWords>(place);
    for (uint32_t pair : words.word) sum = add_zero_times<Element>(pair, sum);
  });
  return !block_any(NonFinite<Element>::in_low_half(sum) || NonFinite<Element>::in_high_half(sum));
}

/// Replaces NaN and infinity among `count` elements of shared memory by 0. All threads of the block call it.
template <int Threads, class Element>
FLASHCUTE_DEVICE void zero_nonfinite(Element* elements, int count) {
  for_each_shared_words<Threads>(elements, count, [&](Element* place) {
    auto words = shared_load<SharedWords>(place);
    for (uint32_t& pair : words.word) {
      if (NonFinite<Element>::in_low_half(pair)) pair &= 0xffff0000u;
      if (NonFinite<Element>::in_high_half(pair)) pair &= 0x0000ffffu;
    }
    shared_store(place, words);
  });
}

}  // namespace flashcute
