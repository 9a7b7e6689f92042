// What a computing warpgroup of Hopper's gradients does with S^T and dP^T of its 64 keys and a block of queries: rows
// are keys, columns are queries.
#pragma once

#include "flashcute/sm90/passing_queries.hpp"
// After the instructions that the header above includes.
#include "flashcute/device/fragment.hpp"

namespace flashcute::sm90 {

/// The LSE or delta of the thread's queries of a block, read from shared memory where they are used.
template <class L>
class StatisticsInMemory {
 public:
  /// `own`: of the thread's first query.
  FLASHCUTE_DEVICE explicit StatisticsInMemory(float const* own) : own_(own) {}
  FLASHCUTE_DEVICE float operator[](int j) const { return shared_load<float>(own_ + L::column_distance(j)); }

 private:
  float const* own_;
};

/// The same, read when they are made: a register for each column.
template <class L>
class StatisticsInRegisters {
  static constexpr int columns = L::queries / 4;

 public:
  FLASHCUTE_DEVICE explicit StatisticsInRegisters(float const* own) {
    CUTE_UNROLL
    for (int j = 0; j < columns; j += 2) {
      auto const pair = shared_load<float2>(own + L::column_distance(j));
      of_column_[j] = pair.x, of_column_[j + 1] = pair.y;
    }
  }
  FLASHCUTE_DEVICE float operator[](int j) const { return of_column_[j]; }

 private:
  float of_column_[columns];
};

/// S^T becomes P^T, in place. `lse`: to base 2.
template <class L, class Scores, class Statistics>
FLASHCUTE_DEVICE void to_probabilities(Scores& scores, Statistics const& lse, float const& scale_log2) {
  auto s = by_row_and_column(scores);  // (key, query)
  CUTE_UNROLL
  for (int j = 0; j < cute::size<1>(s); ++j) {
    float const of_query = lse[j];
    CUTE_UNROLL
    for (int i = 0; i < L::rows_per_thread; ++i) s(i, j) = exp2_approx(s(i, j) * scale_log2 - of_query);
  }
}

/// dP^T becomes dS^T, in place.
template <class L, class Scores, class Statistics>
FLASHCUTE_DEVICE void to_score_gradients(Scores& gradients, Scores const& probabilities, Statistics const& delta) {
  auto ds = by_row_and_column(gradients);           // (key, query)
  auto const p = by_row_and_column(probabilities);  // (key, query)
  CUTE_UNROLL
  for (int j = 0; j < cute::size<1>(ds); ++j) {
    float const of_query = delta[j];
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

  /// `query`: the thread's first; `key`: the warpgroup's first.
  FLASHCUTE_DEVICE void load(int query, int key, Sequence const& sequence) {
    CUTE_UNROLL
    for (int i = 0; i < L::rows_per_thread; ++i) of_key[i] = bits(key + L::row(i), query, sequence);
  }

  FLASHCUTE_DEVICE static uint32_t bits(int key, int query, Sequence const& sequence) {
    return Mask::template queries_seeing<L::queries>(key, query, sequence).template bits<L>(0);
  }
};

/// Sets what a query does not see to 0: by selection, because it may be NaN. `query` and `key` as of
/// SeeingQueries::load. `loaded`: what memory says, if it does.
template <class L, class Mask, class Scores>
FLASHCUTE_DEVICE void hide_unseen(Scores& scores, int query, int key, typename Mask::Sequence const& sequence,
                                  SeeingQueries<L, Mask> const& loaded = {}) {
  using Seeing = SeeingQueries<L, Mask>;
  auto s = by_row_and_column(scores);  // (key, query)
  CUTE_UNROLL
  for (int i = 0; i < L::rows_per_thread; ++i) {
    uint32_t const bits = Seeing::in_memory ? loaded.of_key[i] : Seeing::bits(key + L::row(i), query, sequence);
    CUTE_UNROLL
    for (int j = 0; j < cute::size<1>(s); ++j) {
      if (!(bits & 1u << j)) s(i, j) = 0.f;
    }
  }
}

}  // namespace flashcute::sm90
