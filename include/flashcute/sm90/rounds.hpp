// How Hopper's kernel deals tiles of query rows to its thread blocks, each of which computes one after the other. No
// counter in memory deals them out, so nothing has to be cleared, and every launch is the same. The host decides who
// gets which tile (src/launch/tile_deal.cpp), and each block walks the same rounds to find its own.
#pragma once

#include "flashcute/core/forward_config.hpp"
#include "flashcute/policy/query_tile.hpp"

namespace flashcute {

/// How many rounds of tiles Hopper's kernel takes heads for at once, and in the end: their K and V shall stay in the L2
/// cache (132 tiles of 128 rows have 9 MB at head_dim 128), but to the end there must be short tiles for those who have
/// less to do so far.
struct SectionRounds {
  int32_t usual, last;

  constexpr bool operator==(SectionRounds const&) const = default;
};
inline constexpr SectionRounds equally_long{0, 0};  // tiles, which then go by heads
constexpr SectionRounds section_rounds(ForwardKernelId const& k) {
  switch (k.features.mask) {
    case MaskKind::full: return equally_long;
    case MaskKind::causal:
    case MaskKind::band: return {1, k.config.head_dim > 128 ? 2 : 4};
  }
  return equally_long;
}

/// That Hopper's kernel uses: all that the chip has (an H100 or H200 has 132). On a larger one of compute
/// capability 9.0 the rest would be idle, as `explain` then says.
inline constexpr int32_t max_multiprocessors = 144;

/// The `i`-th tile of a head from its last rows on. The tile that has fewer rows than others is the first rows': under
/// a causal mask it sees the fewest keys, and warpgroups without a row have the least to wait for.
FLASHCUTE_HD QueryTile sm90_tile(ForwardParams const& p, uint32_t head_index, int32_t i, int32_t tile_rows) {
  return QueryTile::whole_head(p, head_index).part_from_end(i, tile_rows);
}

/// One tile for each thread block, or for some of them, by turn; the longest come first. Thread blocks of a cluster
/// compute one tile together: here they are one.
struct TileRound {
  uint32_t head0;  // first head of the section, of all batches
  int32_t heads;   // in the section
  int32_t first;   // tile of the section that the round begins with
  int32_t count;   // of tiles
  int32_t start;   // the block whose turn is the first
  bool by_head;    // all tiles of a head follow each other
  bool backwards;  // blocks take their turns from the last to the first

  /// The turn of a block, if nothing else is known of it; `count` or more: it gets none.
  FLASHCUTE_HD int32_t turn(int32_t block, int32_t blocks) const {
    int32_t const turn = (block + blocks - start) % blocks;
    return backwards && turn < count ? count - 1 - turn : turn;
  }

  /// In a section the long tiles come first: the last rows of all its heads, then the rows before. But where all are
  /// equally long, those of a head do, which read the same keys at about the same time.
  FLASHCUTE_HD QueryTile tile(ForwardParams const& p, int32_t turn, int32_t tile_rows) const {
    int32_t const index = first + turn;
    if (by_head) {
      int32_t const per_head = ceil_div(p.seqlen_q, tile_rows);
      return sm90_tile(p, head0 + static_cast<uint32_t>(index / per_head), index % per_head, tile_rows);
    }
    return sm90_tile(p, head0 + static_cast<uint32_t>(index % heads), index / heads, tile_rows);
  }
};

/// Heads are taken in sections, whose K and V shall stay in the L2 cache, and the tiles of a section are dealt in
/// rounds, every other one backwards, so that who got a long tile gets a short one next. The next section goes on with
/// the block after the last that got one. The last section is larger: there are to be short tiles in the end, for those
/// who have less to do so far. If all tiles are equally long (`per_section` 0), there is one section.
class TileRounds {
 public:
  FLASHCUTE_HD TileRounds(ForwardParams const& p, int32_t tile_rows, int32_t blocks, SectionRounds per_section)
      : blocks_(blocks),
        row_blocks_(ceil_div(p.seqlen_q, tile_rows)),
        last_rounds_(per_section.last),
        heads_left_(static_cast<uint32_t>(p.batch) * static_cast<uint32_t>(p.heads)) {
    bool const by_head = per_section.usual == 0;
    section_ = by_head ? static_cast<int32_t>(heads_left_) : max_of(1, per_section.usual * blocks / row_blocks_);
    round_.heads = first_heads();
    round_.by_head = by_head;
  }

  /// Sets `round` to the next one; false if there is none.
  FLASHCUTE_HD bool next(TileRound& round) {
    int32_t const tiles = round_.heads * row_blocks_;
    if (tiles == 0) return false;
    round_.count = min_of(blocks_, tiles - round_.first);
    round = round_;
    round_.first += round_.count;
    if (round_.by_head) {
      // A head's incomplete tile shall not always be the same blocks'.
      round_.start = (round_.start + 1) % blocks_;
    } else {
      round_.backwards = !round_.backwards;
    }
    if (round_.first == tiles) {
      heads_left_ -= static_cast<uint32_t>(round_.heads);
      round_ = {round_.head0 + static_cast<uint32_t>(round_.heads),
                first_heads(),
                0,
                0,
                (round_.start + round_.count) % blocks_,
                round_.by_head,
                round_.backwards};
    }
    return true;
  }

 private:
  FLASHCUTE_HD int32_t first_heads() const {
    bool const last = static_cast<int64_t>(heads_left_) * row_blocks_ <= static_cast<int64_t>(last_rounds_) * blocks_;
    return static_cast<int32_t>(last ? heads_left_ : min_of(heads_left_, static_cast<uint32_t>(section_)));
  }

  int32_t blocks_, row_blocks_;
  int32_t section_;  // heads
  int32_t last_rounds_;
  uint32_t heads_left_;
  TileRound round_ = {};
};

/// Whose turn it is, round by round, where it pays to look closely: each tile to the block that has the least to do.
/// The rounds from `first_round` on are here, those before follow TileRound::turn.
struct TileDeal {
  static constexpr int32_t rounds = 16;

  int32_t first_round;
  uint8_t turns[rounds][max_multiprocessors];  // 0xff: none
  static_assert(max_multiprocessors < 0xff);

  FLASHCUTE_HD int32_t turn(int32_t index, TileRound const& round, int32_t block, int32_t blocks) const {
    return index < first_round ? round.turn(block, blocks) : turns[index - first_round][block];
  }
};

}  // namespace flashcute
