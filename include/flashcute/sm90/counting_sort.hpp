// Sorting by counting, by all threads of a block, in shared memory.
#pragma once

#include "flashcute/sm90/instructions.hpp"

namespace flashcute::sm90 {

/// A cost in blocks of keys as one of a few levels, so that it can be sorted by counting. Fewer than `exact` blocks
/// have a level for each number; of more, a level begins with at most 1 / `steps` more blocks than the level before.
struct CostLevel {
  static constexpr int32_t count = 256, steps = 32, exact = 2 * steps;

  FLASHCUTE_HD static int32_t of(int32_t blocks) {
    int32_t octave = 0;
    while (blocks >> octave >= exact) ++octave;
    return min_of(steps * octave + (blocks >> octave), count - 1);
  }
};

/// A stable sort of items by level, the highest level first. Each warp sorts a part of the items, which follow each
/// other. `Threads`: of the block.
template <int32_t Threads>
class CountingSort {
  static constexpr int32_t warps = Threads / 32, levels = CostLevel::count;
  static_assert(Threads >= levels, "a thread for each level");

 public:
  /// In place of a level: the item is left out.
  static constexpr uint16_t no_level = 0xffff;

  struct Place {
    uint16_t level, rank;  // the latter among items of the same level in the warp's part
  };

  /// Numbers of items.
  struct Counts {
    uint16_t of_warp[warps][levels];  // with a level in the warp's part; later, in the parts before it
    uint16_t above[levels];           // of higher levels: the first place of a level
    uint16_t of_32[levels / 32];      // of 32 levels
    int32_t all;

    /// The number of items with a level.
    FLASHCUTE_HD int32_t of(int32_t level) const { return (level == 0 ? all : above[level - 1]) - above[level]; }
  };

  /// Calls level_of(i) once for each of `count` items, all threads of a warp together, and then put(i, place) for those
  /// that have a level. All threads call it; they have to synchronise before they read what was put. `places`: for each
  /// item.
  template <class LevelOf, class Put>
  FLASHCUTE_DEVICE static void sort(int32_t count, Counts& counts, Place* places, LevelOf const& level_of,
                                    Put const& put) {
    count_levels(count, counts.of_warp[warp()], places, level_of);
    block_sync();  // all warps have counted
    if (thread_index() < levels) sum_by_level(counts);
    block_sync();  // the sums of all levels are in shared memory
    if (thread_index() < levels) find_first_places(counts);
    block_sync();  // the first place of each level is in shared memory
    for_each_of_warp(count, [&](int32_t i, bool exists) {
      if (!exists) return;
      auto const [level, rank] = places[i];
      if (level != no_level) put(i, counts.above[level] + counts.of_warp[warp()][level] + rank);
    });
  }

 private:
  FLASHCUTE_DEVICE static int warp() { return thread_index() / 32; }

  /// Calls f(i, exists) for the items of the warp's part, all lanes together.
  template <class F>
  FLASHCUTE_DEVICE static void for_each_of_warp(int32_t count, F const& f) {
    int32_t const part = ceil_div(count, Threads) * 32, first = warp() * part;
#pragma unroll 1
    for (int32_t i = first; i < min_of(first + part, count); i += 32) {
      int32_t const item = i + thread_index() % 32;
      f(item, item < count);
    }
  }

  /// Finds the level of each item, and its rank in the warp's part.
  template <class LevelOf>
  FLASHCUTE_DEVICE static void count_levels(int32_t count, uint16_t (&counts)[levels], Place* places,
                                            LevelOf const& level_of) {
    for (int level = thread_index() % 32; level < levels; level += 32) counts[level] = 0;
    reconverge();  // all counts of the warp are 0
    for_each_of_warp(count, [&](int32_t i, bool exists) {
      uint16_t const level = exists ? level_of(i) : no_level;
      reconverge();  // each lane knows its level
      auto const [before, all] = equals_in_warp(level);
      int32_t const counted = level == no_level ? 0 : counts[level];
      if (exists) places[i] = {level, static_cast<uint16_t>(counted + before)};
      reconverge();  // all lanes have read the counts
      if (level != no_level && before == 0) counts[level] = static_cast<uint16_t>(counted + all);
      reconverge();  // the counts have these items too
    });
  }

  FLASHCUTE_DEVICE static void sum_by_level(Counts& counts) {
    int const level = thread_index();
    uint32_t of_warp[warps];  // read before any is written, so that all reads are under way at the same time
    CUTE_UNROLL
    for (int i = 0; i < warps; ++i) of_warp[i] = counts.of_warp[i][level];
    uint32_t sum = 0;
    CUTE_UNROLL
    for (int i = 0; i < warps; ++i) {
      counts.of_warp[i][level] = static_cast<uint16_t>(sum);
      sum += of_warp[i];
    }
    uint32_t above = 0;  // among the levels of the lanes that have exchanged their sums
    CUTE_UNROLL
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      uint32_t const others = shuffle_xor_word(sum, lanes);
      if ((level & lanes) == 0) above += others;
      sum += others;
    }
    counts.above[level] = static_cast<uint16_t>(above);
    if (level % 32 == 0) counts.of_32[level / 32] = static_cast<uint16_t>(sum);
  }

  FLASHCUTE_DEVICE static void find_first_places(Counts& counts) {
    int const level = thread_index();
    int32_t above = 0;
    CUTE_UNROLL
    for (int higher = levels / 32 - 1; higher > 0; --higher) {
      int32_t const of_higher = counts.of_32[higher];
      if (higher > level / 32) above += of_higher;
    }
    if (level == 0) counts.all = above + counts.of_32[0];
    counts.above[level] = static_cast<uint16_t>(counts.above[level] + above);
  }
};

}  // namespace flashcute::sm90
