// The order of tiles on Hopper where the host does not know which are long: the lengths of packed sequences, and block
// maps, lie in memory. Each thread block sorts the tiles of a head by cost before its first one, all of them alike, and
// keeps those that are its own.
#pragma once

#include "flashcute/policy/mask.hpp"
#include "flashcute/sm90/counting_sort.hpp"
#include "flashcute/sm90/instructions.hpp"
#include "flashcute/sm90/rounds.hpp"

namespace flashcute::sm90 {

/// The turn of a thread block in a round whose costs are sorted. As in TileRounds some rounds go backwards, so that a
/// block with a longer tile gets a shorter one next. But not every other round: where the cost falls about every second
/// round, that would favour the same blocks each time. Of pairs of rounds, and of pairs of pairs, every other one is
/// turned too (the Thue-Morse sequence): a round goes backwards if its number has an odd number of ones.
FLASHCUTE_HD int32_t sorted_turn(int32_t round, int32_t block, int32_t blocks) {
  int32_t ones = round;
  for (int32_t bits = 16; bits > 0; bits /= 2) ones ^= ones >> bits;
  return ones % 2 != 0 ? blocks - 1 - block : block;
}

/// a / b of numbers below 2^20. (For any integers nvcc divides in some forty instructions, one after the other.)
FLASHCUTE_DEVICE int32_t small_quotient(int32_t a, int32_t b) {
  return static_cast<int32_t>((static_cast<float>(a) + 0.5f) * reciprocal_approx(static_cast<float>(b)));
}

/// The number of a tile: its slot times the number of heads, and its head. A slot is a place for a tile of each head:
/// that of packed sequences, or the number of the tile among those of all batch entries.
using TileNumber = uint16_t;
inline constexpr TileNumber no_tile = 0xffff;

/// The tiles of a thread block, or of a cluster, in shared memory: at most `Bytes` bytes.
template <class Sequence, int32_t Bytes>
struct OwnTiles {
  static constexpr int32_t most = (Bytes - static_cast<int32_t>(sizeof(int32_t))) / sizeof(TileNumber);

  int32_t count;  // with places for tiles that do not exist; -1: tiles are not sorted
  TileNumber tiles[most];

  FLASHCUTE_HD bool sorted() const { return count >= 0; }
};

/// The host knows the tiles of sequences that fill the tensors.
template <int32_t Bytes>
struct OwnTiles<UniformSequence, Bytes> {};

/// Tiles are handed out in rounds, in which each block gets a unit: one tile, or of packed sequences two of the same
/// sequence and head whose costs differ, the last and the first, the last but one and the second, and so on. Under a
/// causal mask all pairs of a sequence cost about the same. So units can be sorted by cost, the costliest first,
/// without taking the tiles of a sequence apart: what runs at the same time reads the same keys. Among units of the
/// same cost those of one head follow each other, or of the heads that share keys: these are read at the same time,
/// once for all. Pairs that would be dealt in the last rounds are dealt as single tiles, sorted by cost, since blocks
/// should not end a pair apart. (What a map shows the first head counts for all.)
///
/// Where tiles are not sorted, slots are in the order of their rows, all heads of a slot together: then each block gets
/// tiles of all lengths that a sequence has.
template <ForwardConfig C, class Mask>
class TileOrder {
  using Tile = QueryTile<typename Mask::Sequence>;

  static constexpr int32_t rows = tile_rows(C), threads = num_threads(C);
  using Sort = CountingSort<threads>;

  /// What the start of a tile and its end cost, in blocks of keys: some 2^24 operations.
  static constexpr int32_t cost_of_ends = max_of(1, (1 << 24) / (2 * rows * C.block_n * (C.head_dim + C.head_dim_v)));

  /// As many query rows keep the tensor cores busy for as long as memory needs for a key: at 600 TFLOP/s and 4 TB/s,
  /// with an operation for each byte and row.
  static constexpr int32_t enough_rows = 150;
  static constexpr bool may_pair = Mask::Range::contiguous && rows < enough_rows;  // packed sequences have no maps

  /// Rounds of pairs, beside the last incomplete one, that are dealt as single tiles.
  static constexpr int32_t last_rounds = 1;

  /// A unit of each head.
  struct Unit {
    uint16_t slots[2];  // the second: `none` if it is a single tile
    uint8_t levels[2];  // of these tiles
    uint8_t level;      // of both together

    static constexpr uint16_t none = 0xffff;
  };

  static constexpr int32_t most_last_tiles = 2 * (last_rounds + 1) * max_multiprocessors;
  struct LastTiles {
    typename Sort::Place places[most_last_tiles];
    TileNumber tiles[most_last_tiles], sorted[most_last_tiles];
  };
  struct Fixed {
    typename Sort::Counts counts;
    LastTiles last;
    bool pairs;  // whether there are any
  };
  static constexpr int32_t memory_bytes = static_cast<int32_t>(smem_bytes(C)) - control_bytes;
  static constexpr int32_t bytes_of_slot = sizeof(typename Sort::Place) + 2 * sizeof(Unit);
  static constexpr int32_t most_slots = (memory_bytes - static_cast<int32_t>(sizeof(Fixed))) / bytes_of_slot;

  /// The starts of packed sequences, of which there are fewer than slots.
  struct Starts {
    int32_t queries[most_slots], keys[most_slots];
  };

  /// What sorting needs, in the memory of tiles that are not loaded yet.
  struct Memory : Fixed {
    Unit units[most_slots];
    typename Sort::Place places[most_slots];  // of `units`
    union {
      Starts starts;  // until all costs are known
      Unit sorted[most_slots];
    };
  };
  static_assert(most_slots > 0 && sizeof(Memory) <= memory_bytes);

 public:
  /// Sorts the tiles of packed sequences and finds those of block `block`, of `blocks` thread blocks or clusters. All
  /// threads call it; they have to synchronise before they read `own`, or use the memory of `tiles`.
  template <class Own>
  FLASHCUTE_DEVICE static void prepare(ForwardParams const& p, int32_t block, int32_t blocks, void* tiles, Own& own) {
    if (applies<Own>(p, blocks)) {
      auto& memory = *static_cast<Memory*>(tiles);
      sort(with_starts_in(memory, p), memory);
      deal(p, block, blocks, memory, own);
      publish_to_copies();  // which write to the same memory
    } else if (thread_index() == 0) {
      own.count = -1;
    }
  }

  /// Sets `place` to that of the block's next tile, and `next` to the number of the one after it, at first 0; false if
  /// there is none.
  template <class Own>
  FLASHCUTE_DEVICE static bool find(ForwardParams const& p, int32_t& next, int32_t block, int32_t blocks,
                                    Own const& own, TilePlace& place) {
    int32_t tile = no_tile;
    if (own.sorted()) {
      while (next < own.count && tile == no_tile) tile = own.tiles[next++];
      if (tile == no_tile) return false;
    } else {
      tile = next * blocks + sorted_turn(next, block, blocks);
      ++next;
      if (tile >= slots(p) * p.heads) return false;
    }
    int32_t const near = place.near;
    place = place_of(p, tile / p.heads, tile % p.heads);
    place.near = near;
    return true;
  }

  /// Whether `find` tells the tiles of a launch.
  template <class Own>
  FLASHCUTE_DEVICE static bool decides(ForwardParams const& p, Own const& own) {
    return Mask::Sequence::is_packed(p) || (wants_order(p) && own.sorted());
  }

 private:
  FLASHCUTE_HD static bool wants_order(ForwardParams const& p) {
    return Mask::Sequence::is_packed(p) || !Mask::Range::contiguous;
  }

  /// Of a head, in all batch entries.
  FLASHCUTE_HD static int32_t slots(ForwardParams const& p) { return Tile::blocks_of_head(p, rows) * p.batch; }

  /// Whether tiles of a sequence have to run together: where K and V of all heads do not fit the level 2 cache, and a
  /// key that each tile reads from memory is used by too few rows: those of the tiles of the query heads that share it.
  /// Otherwise single tiles balance better.
  FLASHCUTE_HD static bool takes_pairs(ForwardParams const& p) {
    if (!may_pair || !Mask::Sequence::is_packed(p)) return false;
    int64_t const bytes_of_key = int64_t{p.kv_heads} * (p.head_dim + p.head_dim_v) * size_of(C.dtype);
    return p.seqlen_k * bytes_of_key > HeadsInTurn<int32_t>::cache_bytes &&
           int64_t{rows} * p.heads < int64_t{enough_rows} * p.kv_heads;
  }

  FLASHCUTE_HD static TilePlace place_of(ForwardParams const& p, int32_t slot, int32_t head) {
    if (Mask::Sequence::is_packed(p)) return {static_cast<uint32_t>(head), slot};
    int32_t const of_entry = Tile::blocks_of_head(p, rows);
    return {static_cast<uint32_t>(slot / of_entry * p.heads + head), slot % of_entry};
  }

  /// Whether tiles are sorted: not in a single round, where the order changes nothing, nor where they do not fit the
  /// memory.
  template <class Own>
  FLASHCUTE_HD static bool applies(ForwardParams const& p, int32_t blocks) {
    if (!wants_order(p) || blocks > max_multiprocessors) return false;
    int64_t const count = int64_t{Tile::blocks_of_head(p, rows)} * p.batch, tiles = count * p.heads;
    return tiles > blocks && tiles < no_tile && tiles <= int64_t{blocks} * Own::most && count <= most_slots;
  }

  /// The same with the starts of packed sequences in shared memory, where they are searched.
  FLASHCUTE_DEVICE static ForwardParams with_starts_in(Memory& memory, ForwardParams const& p) {
    ForwardParams with = p;
    if (Mask::Sequence::is_packed(p)) {
#pragma unroll 1
      for (int32_t i = thread_index(); i <= p.sequences.count; i += threads) {
        int32_t const query = p.sequences.cu_seqlens_q[i], key = p.sequences.cu_seqlens_k[i];
        memory.starts.queries[i] = query;
        memory.starts.keys[i] = key;
      }
      with.sequences.cu_seqlens_q = memory.starts.queries;
      with.sequences.cu_seqlens_k = memory.starts.keys;
    }
    return with;
  }

  FLASHCUTE_DEVICE static void sort(ForwardParams const& p, Memory& memory) {
    if (thread_index() == 0) memory.pairs = false;
    block_sync();  // before any thread finds a pair; the starts are in shared memory
    Sort::sort(
        slots(p), memory.counts, memory.places,
        [&](int32_t slot) -> uint16_t {
          Unit& unit = memory.units[slot];
          if (!find_unit(p, slot, unit)) return Sort::no_level;
          if (unit.slots[1] != Unit::none) memory.pairs = true;
          return unit.level;
        },
        [&](int32_t slot, int32_t place) { memory.sorted[place] = memory.units[slot]; });
    block_sync();  // all units are in their places
  }

  FLASHCUTE_DEVICE static int32_t visits(ForwardParams const& p, Tile const& tile) {
    return Mask::kv_range(tile, p, C.block_n).visits();
  }

  /// The cost of a tile in blocks of keys. Warpgroups without rows wait, but blocks are loaded for the others as ever:
  /// half of a block's cost is taken to be theirs.
  FLASHCUTE_HD static int32_t cost(int32_t visits, int32_t rows_of_tile) {
    constexpr int32_t warpgroups = ceil_div(rows, warpgroup_rows);
    return cost_of_ends + ceil_div(visits * (1 + ceil_div(rows_of_tile, warpgroup_rows)), 1 + warpgroups);
  }
  FLASHCUTE_HD static uint8_t level_of(int32_t cost) { return static_cast<uint8_t>(CostLevel::of(cost)); }

  /// Sets `unit` to the one of which the slot is the first; false if there is none.
  FLASHCUTE_DEVICE static bool find_unit(ForwardParams const& p, int32_t slot, Unit& unit) {
    auto const tile = place_of(p, slot, 0).template tile<Tile>(p, rows);
    if (tile.rows == 0) return false;
    int32_t const own_visits = visits(p, tile), own = cost(own_visits, tile.rows);
    unit = {{static_cast<uint16_t>(slot), Unit::none}, {level_of(own), 0}, level_of(own)};
    if (!takes_pairs(p)) return true;

    // Tiles of a sequence are counted from its last rows, here too.
    int32_t const i = slot - tile.entry.first_query_block(rows);
    Tile sequence = tile;
    sequence.rows += tile.row0 + i * rows;
    sequence.row0 = 0;
    int32_t const last = ceil_div(sequence.rows, rows) - 1;
    Tile const other = sequence.part_from_end(last - i, rows);
    int32_t const other_visits = visits(p, other), both = own + cost(other_visits, other.rows);
    if (level_of(other_visits) == level_of(own_visits)) return true;
    if (i > last - i) return false;
    unit = {{static_cast<uint16_t>(slot), static_cast<uint16_t>(slot + last - 2 * i)},
            {level_of(own), level_of(both - own)},
            level_of(both)};
    return true;
  }

  /// The unit and the head with place `i` in the order of units of all heads.
  struct UnitOfHead {
    Unit unit;
    int32_t head;

    FLASHCUTE_HD TileNumber tile(ForwardParams const& p, bool second) const {
      int32_t const slot = second ? unit.slots[1] : unit.slots[0];
      return static_cast<TileNumber>(slot == Unit::none ? no_tile : slot * p.heads + head);
    }
    FLASHCUTE_HD uint8_t level(bool second) const { return second ? unit.levels[1] : unit.levels[0]; }
  };
  FLASHCUTE_DEVICE static UnitOfHead unit_at(ForwardParams const& p, int32_t i, Memory const& memory) {
    int32_t const level = memory.sorted[small_quotient(i, p.heads)].level;
    int32_t const first = memory.counts.above[level], equal = memory.counts.of(level);
    int32_t const group = small_quotient(p.heads, p.kv_heads), of_equal = i - first * p.heads;
    int32_t const kv_head = small_quotient(of_equal, equal * group), of_group = of_equal - kv_head * equal * group;
    int32_t const unit = small_quotient(of_group, group);
    return {memory.sorted[first + unit], kv_head * group + of_group - unit * group};
  }

  template <class Own>
  FLASHCUTE_DEVICE static void deal(ForwardParams const& p, int32_t block, int32_t blocks, Memory& memory, Own& own) {
    bool const pairs = may_pair && memory.pairs;
    int32_t const units = memory.counts.all * p.heads, tiles_of_unit = pairs ? 2 : 1;
    int32_t const rounds =
        pairs ? max_of(0, small_quotient(units, blocks) - last_rounds) : small_quotient(units + blocks - 1, blocks);
    int32_t const dealt = min_of(rounds * blocks, units), last_tiles = 2 * (units - dealt);
    int32_t const last_of_block = small_quotient(last_tiles + blocks - 1, blocks);
    int32_t const count = rounds * tiles_of_unit + last_of_block;
    if (count > Own::most) {
      if (thread_index() == 0) own.count = -1;
      return;
    }
#pragma unroll 1
    for (int32_t round = thread_index(); round < rounds; round += threads) {
      int32_t const i = round * blocks + sorted_turn(round, block, blocks);
      TileNumber* const tiles = own.tiles + round * tiles_of_unit;
      if (i >= units) {
        tiles[0] = no_tile;  // no pairs
        continue;
      }
      auto const unit = unit_at(p, i, memory);
      tiles[0] = unit.tile(p, false);
      if (pairs) tiles[1] = unit.tile(p, true);
    }
    if (pairs && last_tiles > 0) sort_last_tiles(p, dealt, last_tiles, memory);
#pragma unroll 1
    for (int32_t i = thread_index(); i < last_of_block; i += threads) {
      int32_t const place = i * blocks + sorted_turn(rounds + i, block, blocks);
      own.tiles[rounds * tiles_of_unit + i] = place < memory.counts.all ? memory.last.sorted[place] : no_tile;
    }
    if (thread_index() == 0) own.count = count;
  }

  FLASHCUTE_DEVICE static void sort_last_tiles(ForwardParams const& p, int32_t first_unit, int32_t tiles,
                                               Memory& memory) {
    LastTiles& last = memory.last;
    Sort::sort(
        tiles, memory.counts, last.places,
        [&](int32_t i) -> uint16_t {
          auto const unit = unit_at(p, first_unit + i / 2, memory);
          bool const second = i % 2 != 0;
          last.tiles[i] = unit.tile(p, second);
          return last.tiles[i] == no_tile ? Sort::no_level : unit.level(second);
        },
        [&](int32_t i, int32_t place) { last.sorted[place] = last.tiles[i]; });
    block_sync();  // the last tiles are in their places
  }
};

}  // namespace flashcute::sm90
