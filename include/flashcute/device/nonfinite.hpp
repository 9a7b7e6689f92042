// NaN and infinity in V that only some rows of a tile see. O += P V multiplies a hidden value by 0, which adds nothing
// while the value is finite; but 0 * NaN and 0 * infinity are NaN. So before a product in which rows see different
// keys, values that are not finite are replaced by 0; at the end, if there were any, every element of the output adds
// those of them that its row sees.
#pragma once

#include "flashcute/device/fragment.hpp"

namespace flashcute {

/// Recognises NaN and infinity by the bits of an element: all bits of its exponent are 1.
template <class Element>
struct NonFinite {
  static constexpr int bits = 8 * sizeof(Element);
  static constexpr uint32_t exponent = std_::is_same_v<Element, cute::half_t> ? 0x7c00
                                       : bits == 16                           ? 0x7f80
                                                                              : 0x7f800000;

  FLASHCUTE_DEVICE static bool in_low(uint32_t word) { return (word & exponent) == exponent; }
  FLASHCUTE_DEVICE static bool in_high(uint32_t word) { return bits == 16 && in_low(word >> 16); }

  /// The word with 0 in place of what is not finite.
  FLASHCUTE_DEVICE static uint32_t dropped(uint32_t word) {
    constexpr uint32_t low = bits == 16 ? 0x0000ffffu : 0xffffffffu;
    if (in_low(word)) word &= ~low;
    if (in_high(word)) word &= low;
    return word;
  }
};

FLASHCUTE_DEVICE bool is_finite(float x) { return x - x == 0; }

/// Some bytes of shared memory.
template <int Bytes>
struct alignas(Bytes) SharedWords {
  uint32_t word[Bytes / 4];
};

/// Whether elements of shared memory are all finite: one sum of 0 times each element becomes NaN if any is not.
template <class Element>
class FiniteCheck {
 public:
  template <int Bytes>
  FLASHCUTE_DEVICE void look_at(Element const* place) {
    auto const words = shared_load<SharedWords<Bytes>>(place);
    for (uint32_t word : words.word) sum_ = add_zero_times<Element>(word, sum_);
  }

  FLASHCUTE_DEVICE bool all_finite() const {
    return !NonFinite<Element>::in_low(sum_) && !NonFinite<Element>::in_high(sum_);
  }

 private:
  uint32_t sum_ = 0;
};

/// Calls f(place) for each 16 bytes of `count` elements of shared memory that are this thread's part.
template <int Threads, class Element, class F>
FLASHCUTE_DEVICE void for_each_shared_words(Element* elements, int count, F const& f) {
  constexpr int vector = 16 / sizeof(Element);
  for (int i = vector * thread_index(); i < count; i += vector * Threads) f(elements + i);
}

/// Whether `count` elements of shared memory are all finite. All threads of the block call it.
template <int Threads, class Element>
FLASHCUTE_DEVICE bool block_all_finite(Element* elements, int count) {
  FiniteCheck<Element> check;
  for_each_shared_words<Threads>(elements, count, [&](Element* place) { check.template look_at<16>(place); });
  return !block_any(!check.all_finite());
}

/// Replaces NaN and infinity in 16 bytes of shared memory by 0.
template <class Element>
FLASHCUTE_DEVICE void zero_nonfinite(Element* place) {
  auto words = shared_load<SharedWords<16>>(place);
  for (uint32_t& word : words.word) word = NonFinite<Element>::dropped(word);
  shared_store(place, words);
}

/// The same for `count` elements. All threads of the block call it, and have to synchronise afterwards.
template <int Threads, class Element>
FLASHCUTE_DEVICE void zero_nonfinite(Element* elements, int count) {
  for_each_shared_words<Threads>(elements, count, [](Element* place) { zero_nonfinite(place); });
}

}  // namespace flashcute
