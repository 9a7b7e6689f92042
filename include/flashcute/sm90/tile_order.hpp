// The order of tiles on Hopper where the host does not know which are long: the lengths of packed sequences, and block
// maps, lie in memory. Each thread block sorts the tiles of a head by cost before its first one, all of them alike, and
// keeps those that are its own.
#pragma once

#include "flashcute/policy/mask.hpp"
#include "flashcute/sm90/instructions.hpp"
#include "flashcute/sm90/rounds.hpp"

namespace flashcute::sm90 {

/// The cost of a tile as one of a few levels, so that tiles can be sorted by counting. Fewer than `exact` blocks of
/// keys have a level for each number; of more, a level begins with at most 1 / `steps` more blocks than the level
/// before.
struct CostLevel {
  static constexpr int32_t count = 256, steps = 32, exact = 2 * steps;

  FLASHCUTE_HD static int32_t of(int32_t blocks) {
    int32_t octave = 0;
    while (blocks >> octave >= exact) ++octave;
    return min_of(steps * octave + (blocks >> octave), count - 1);
  }
};

/// The turn of a thread block in a round of packed tiles. They are sorted by cost; as in TileRounds some rounds go
/// backwards, so that a block with a longer tile gets a shorter one next. But not every other round: where the cost
/// falls about every second round, that would favour the same blocks each time. Of pairs of rounds, and of pairs of
/// pairs, every other one is turned too (the Thue-Morse sequence): a round goes backwards if its number has an odd
/// number of ones.
FLASHCUTE_HD int32_t sorted_turn(int32_t round, int32_t block, int32_t blocks) {
  int32_t ones = round;
  for (int32_t bits = 16; bits > 0; bits /= 2) ones ^= ones >> bits;
  return ones % 2 != 0 ? blocks - 1 - block : block;
}

/// A tile of each head: a slot of packed sequences that has rows, and the sequence that they belong to; else the number
/// of the tile among those of all batch entries.
struct TileSlot {
  uint16_t slot, sequence;

  static constexpr int32_t most = 0xffff;
};

/// The tiles of a thread block, or of a cluster, in shared memory: at most `Bytes` bytes.
template <class Sequence, int32_t Bytes>
struct OwnTiles {
  static constexpr int32_t rounds = (Bytes - static_cast<int32_t>(sizeof(int32_t))) / sizeof(TileSlot);

  int32_t slots;              // that have rows; -1: tiles are not sorted
  TileSlot of_round[rounds];  // the block's turn says of which head

  FLASHCUTE_HD bool sorted() const { return slots >= 0; }
};

/// The host knows the tiles of sequences that fill the tensors.
template <int32_t Bytes>
struct OwnTiles<UniformSequence, Bytes> {};

/// Tile i of a launch is that of head i % heads in the slot with place i / heads in the order of costs, the longest
/// first: the tiles of a round cost about the same. Where packed tiles are not sorted, slots are in the order of their
/// rows: then each block gets tiles of all lengths that a sequence has. (What a map shows the first head counts for
/// all.)
template <ForwardConfig C, class Mask>
class TileOrder {
  using Tile = QueryTile<typename Mask::Sequence>;

  static constexpr int32_t rows = tile_rows(C), threads = num_threads(C), warps = threads / 32;
  static constexpr uint16_t no_level = 0xffff;  // of a slot without rows

  /// Numbers of slots. Each warp sorts a part of them, which follow each other.
  struct Counts {
    uint16_t of_warp[warps][CostLevel::count];  // with a level in the warp's part; later, in the parts before it
    uint16_t above[CostLevel::count];           // of higher levels; first, of those among 32 levels
    uint16_t of_32[CostLevel::count / 32];      // of 32 levels
  };
  struct Place {
    uint16_t level, rank;  // the latter among slots of the same level in the warp's part
  };

  static constexpr int32_t memory_bytes = static_cast<int32_t>(smem_bytes(C)) - control_bytes;
  static constexpr int32_t slots_that_fit = (memory_bytes - static_cast<int32_t>(sizeof(Counts))) /
                                            static_cast<int32_t>(sizeof(Place) + 2 * sizeof(TileSlot));
  static constexpr int32_t most_slots = min_of(slots_that_fit, TileSlot::most);

  /// What sorting needs, in the memory of tiles that are not loaded yet.
  struct Memory {
    Counts counts;
    TileSlot slots[most_slots], sorted[most_slots];
    Place places[most_slots];  // of `slots`
  };
  static_assert(most_slots > 0 && sizeof(Memory) <= memory_bytes);

 public:
  /// Sorts the tiles of packed sequences and finds those of block `block`, of `blocks` thread blocks or clusters. All
  /// threads call it; they have to synchronise before they read `own`, or use the memory of `tiles`.
  template <class Own>
  FLASHCUTE_DEVICE static void prepare(ForwardParams const& p, int32_t block, int32_t blocks, void* tiles, Own& own) {
    if (applies<Own>(p, blocks)) {
      sort(p, block, blocks, *static_cast<Memory*>(tiles), own);
    } else if (thread_index() == 0) {
      own.slots = -1;
    }
  }

  /// Sets `place` to that of the tile of a round; false if there is none, and so none in later rounds. `place.near` is
  /// the sequence of the tile before.
  template <class Own>
  FLASHCUTE_DEVICE static bool find(ForwardParams const& p, int32_t round, int32_t block, int32_t blocks,
                                    Own const& own, TilePlace& place) {
    int32_t const i = round * blocks + sorted_turn(round, block, blocks);
    if (i >= (own.sorted() ? own.slots : slots(p)) * p.heads) return false;
    int32_t slot = i / p.heads;
    if (own.sorted()) {
      slot = own.of_round[round].slot;
      place.near = own.of_round[round].sequence;
    }
    int32_t const near = place.near;
    place = place_of(p, slot, i % p.heads);
    place.near = near;
    return true;
  }

  /// Whether `find` tells the tiles of a launch.
  template <class Own>
  FLASHCUTE_DEVICE static bool decides(ForwardParams const& p, Own const& own) {
    return Mask::Sequence::is_packed(p) || (wants_order(p) && own.sorted());
  }

 private:
  FLASHCUTE_DEVICE static int warp() { return thread_index() / 32; }

  FLASHCUTE_HD static bool wants_order(ForwardParams const& p) {
    return Mask::Sequence::is_packed(p) || !Mask::Range::contiguous;
  }

  /// Of a head, in all batch entries.
  FLASHCUTE_HD static int32_t slots(ForwardParams const& p) { return Tile::blocks_of_head(p, rows) * p.batch; }

  FLASHCUTE_HD static TilePlace place_of(ForwardParams const& p, int32_t slot, int32_t head) {
    if (Mask::Sequence::is_packed(p)) return {static_cast<uint32_t>(head), slot};
    int32_t const of_entry = Tile::blocks_of_head(p, rows);
    return {static_cast<uint32_t>(slot / of_entry * p.heads + head), slot % of_entry};
  }

  /// Whether tiles are sorted: not in a single round, where the order changes nothing, nor where they do not fit the
  /// memory.
  template <class Own>
  FLASHCUTE_HD static bool applies(ForwardParams const& p, int32_t blocks) {
    if (!wants_order(p)) return false;
    int64_t const count = int64_t{Tile::blocks_of_head(p, rows)} * p.batch, tiles = count * p.heads;
    return tiles > blocks && tiles <= int64_t{blocks} * Own::rounds && count <= most_slots &&
           p.sequences.count < TileSlot::most;
  }

  /// A stable counting sort.
  template <class Own>
  FLASHCUTE_DEVICE static void sort(ForwardParams const& p, int32_t block, int32_t blocks, Memory& memory, Own& own) {
    count_levels(p, memory);
    block_sync();  // all warps have counted
    if (warp() < CostLevel::count / 32) sum_by_level(memory.counts);
    block_sync();  // the sums of all levels are in shared memory
    if (warp() < CostLevel::count / 32) find_first_places(memory.counts, own);
    block_sync();  // the first place of each level is in shared memory
    for_each_slot(p, [&](int32_t i, bool exists) {
      if (!exists) return;
      auto const [level, rank] = memory.places[i];
      if (level == no_level) return;
      memory.sorted[memory.counts.above[level] + memory.counts.of_warp[warp()][level] + rank] = memory.slots[i];
    });
    block_sync();  // all slots are in their places
    int32_t const count = own.slots * p.heads;
#pragma unroll 1
    for (int32_t round = thread_index(); round * blocks < count; round += threads) {
      int32_t const i = round * blocks + sorted_turn(round, block, blocks);
      if (i < count) own.of_round[round] = memory.sorted[i / p.heads];
    }
    publish_to_copies();  // which write to the same memory
  }

  /// Calls f(slot, exists) for each slot of the warp's part, all lanes together.
  template <class F>
  FLASHCUTE_DEVICE static void for_each_slot(ForwardParams const& p, F const& f) {
    int32_t const count = slots(p);
    int32_t const part = ceil_div(count, threads) * 32, first = warp() * part;
#pragma unroll 1
    for (int32_t i = first; i < min_of(first + part, count); i += 32) {
      int32_t const slot = i + thread_index() % 32;
      f(slot, slot < count);
    }
  }

  /// Finds the level of each slot, and its rank in the warp's part.
  FLASHCUTE_DEVICE static void count_levels(ForwardParams const& p, Memory& memory) {
    auto& counts = memory.counts.of_warp[warp()];
    for (int level = thread_index() % 32; level < CostLevel::count; level += 32) counts[level] = 0;
    reconverge();  // all counts of the warp are 0
    for_each_slot(p, [&](int32_t i, bool exists) {
      uint16_t level = no_level;
      if (exists) {
        auto const tile = place_of(p, i, 0).template tile<Tile>(p, rows);
        int32_t const visits = Mask::kv_range(tile, p, C.block_n).visits();
        if (tile.rows > 0) level = static_cast<uint16_t>(CostLevel::of(visits));
        memory.slots[i] = {static_cast<uint16_t>(i), static_cast<uint16_t>(tile.entry.number)};
      }
      auto const [before, all] = equals_in_warp(level);
      int32_t const counted = level == no_level ? 0 : counts[level];
      if (exists) memory.places[i] = {level, static_cast<uint16_t>(counted + before)};
      reconverge();  // all lanes have read the counts
      if (level != no_level && before == 0) counts[level] = static_cast<uint16_t>(counted + all);
      reconverge();  // the counts have these slots too
    });
  }

  // A thread for each level.
  static_assert(threads >= CostLevel::count);

  FLASHCUTE_DEVICE static void sum_by_level(Counts& counts) {
    int const level = thread_index();
    uint32_t sum = 0;
    for (auto& of_warp : counts.of_warp) {
      uint32_t const count = of_warp[level];
      of_warp[level] = static_cast<uint16_t>(sum);
      sum += count;
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

  template <class Own>
  FLASHCUTE_DEVICE static void find_first_places(Counts& counts, Own& own) {
    int const level = thread_index();
    int32_t above = 0;
    for (int higher = CostLevel::count / 32 - 1; higher > level / 32; --higher) above += counts.of_32[higher];
    if (level == 0) own.slots = above + counts.of_32[0];
    counts.above[level] = static_cast<uint16_t>(counts.above[level] + above);
  }
};

}  // namespace flashcute::sm90
