// What a computing warpgroup of Hopper's gradients does with S^T and dP^T of its 64 keys and a block of queries: rows
// are keys, columns are queries.
#pragma once

#include "flashcute/sm90/passing_queries.hpp"
// After the instructions that the header above includes.
#include "flashcute/device/fragment.hpp"

namespace flashcute::sm90 {

/// S^T becomes P^T, in place. `of_queries`: the base-2 LSE of the block's queries, in shared memory.
template <class L, class Scores>
FLASHCUTE_DEVICE void to_probabilities(Scores& scores, float const* of_queries, float const& scale_log2) {
  auto s = by_row_and_column(scores);  // (key, query)
  float const* const lse = of_queries + L::first_column();
  CUTE_UNROLL
  for (int j = 0; j < cute::size<1>(s); ++j) {
    float const of_query = shared_load<float>(lse + L::column_distance(j));
    CUTE_UNROLL
    for (int i = 0; i < L::rows_per_thread; ++i) s(i, j) = exp2_approx(s(i, j) * scale_log2 - of_query);
  }
}

/// dP^T becomes dS^T, in place. `of_queries`: their delta.
template <class L, class Scores>
FLASHCUTE_DEVICE void to_score_gradients(Scores& gradients, Scores const& probabilities, float const* of_queries) {
  auto ds = by_row_and_column(gradients);           // (key, query)
  auto const p = by_row_and_column(probabilities);  // (key, query)
  float const* const delta = of_queries + L::first_column();
  CUTE_UNROLL
  for (int j = 0; j < cute::size<1>(ds); ++j) {
    float const of_query = shared_load<float>(delta + L::column_distance(j));
    CUTE_UNROLL
    for (int i = 0; i < L::rows_per_thread; ++i) ds(i, j) = p(i, j) * (ds(i, j) - of_query);
  }
}

/// Which of the thread's queries of a block see each of its keys, as bits. Where memory says so they are loaded early;
/// elsewhere they are computed when they are needed: kept until then they would be registers.
template <class L, class Mask>
struct SeeingQueries {
  using Sequence = typename Mask::Sequence;
  static constexpr bool in_memory = !Mask::Range::contiguous;

  uint32_t of_key[L::rows_per_thread];

  /// `key`: the warpgroup's first.
  FLASHCUTE_DEVICE void load(AnnouncedQueries const& block, int key, Sequence const& sequence) {
    int const query = block.row0 + L::first_column();
    CUTE_UNROLL
    for (int i = 0; i < L::rows_per_thread; ++i) of_key[i] = bits(key + L::row(i), query, sequence);
  }

  FLASHCUTE_DEVICE static uint32_t bits(int key, int query, Sequence const& sequence) {
    return Mask::template queries_seeing<L::queries>(key, query, sequence).template bits<L>(0);
  }
};

/// Sets what a query does not see to 0: by selection, because it may be NaN. `key`: the warpgroup's first. `loaded`:
/// what memory says, if it does.
template <class L, class Mask, class Scores>
FLASHCUTE_DEVICE void hide_unseen(Scores& scores, AnnouncedQueries const& block, int key,
                                  typename Mask::Sequence const& sequence, SeeingQueries<L, Mask> const& loaded = {}) {
  using Seeing = SeeingQueries<L, Mask>;
  auto s = by_row_and_column(scores);  // (key, query)
  int const query = block.row0 + L::first_column();
  CUTE_UNROLL
  for (int i = 0; i < L::rows_per_thread; ++i) {
    uint32_t const bits = Seeing::in_memory ? loaded.of_key[i] : Seeing::bits(key + L::row(i), query, sequence);
    CUTE_UNROLL
    for (int j = 0; j < cute::size<1>(s); ++j) {
      if (!(bits & 1u << j)) s(i, j) = 0.f;
    }
  }
}

/// Limits rounded P to 1: where scores are large, their rounding errors can make it exceed 1.
template <class Element, class Probabilities>
FLASHCUTE_DEVICE void hold_at_one(Probabilities& probabilities) {
  auto words = words_of(probabilities);
  CUTE_UNROLL
  for (int i = 0; i < cute::size(words); ++i) words(i) = at_most_one<Element>(words(i));
}

}  // namespace flashcute::sm90
