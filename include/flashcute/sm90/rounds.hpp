// How Hopper's persistent kernel distributes tiles of query rows over its thread blocks. There is no atomic counter:
// nothing has to be cleared before a launch, and every launch distributes tiles alike. The host decides which block
// gets which tile (src/launch/tile_deal.cpp), and each block runs through the same rounds to find its own.
#pragma once

#include "flashcute/core/forward_config.hpp"
#include "flashcute/policy/query_tile.hpp"

namespace flashcute {

/// The size of a section of heads, in rounds of tiles: usually, and for the last section. K and V of a section should
/// stay in the L2 cache (132 tiles of 128 rows have 9 MB at head_dim 128), but the last section has to be large enough
/// to have short tiles for the blocks with the least work so far.
struct SectionRounds {
  int32_t usual, last;

  constexpr bool operator==(SectionRounds const&) const = default;
};
inline constexpr SectionRounds equally_long{0, 0};  // all tiles cost the same: one section, head by head
constexpr SectionRounds section_rounds(ForwardKernelId const& k) {
  switch (k.features.mask) {
    case MaskKind::full: return equally_long;
    case MaskKind::causal:
    case MaskKind::band:
    case MaskKind::mapped: return {1, k.config.head_dim > 128 ? 2 : 4};
  }
  return equally_long;
}

/// Multiprocessors that Hopper's kernel uses at most: as many as the full chip has (an H100 or H200 has 132). On a
/// larger GPU of compute capability 9.0 the rest would be idle, and `explain` says so.
inline constexpr int32_t max_multiprocessors = 144;

/// The `i`-th tile of a head, as QueryTile::from_end counts them; `near` as there.
struct TilePlace {
  uint32_t head;  // of all batches
  int32_t i, near = 0;

  template <class Tile>
  FLASHCUTE_HD Tile tile(ForwardParams const& p, int32_t tile_rows) const {
    return Tile::from_end(p, head, i, tile_rows, near);
  }
};

/// A round: at most one tile for each thread block; the longest come first. The thread blocks of a cluster compute one
/// tile together and count as one here.
struct TileRound {
  uint32_t head0;  // first head of the section, of all batches
  int32_t heads;   // in the section
  int32_t first;   // tile of the section that the round begins with
  int32_t count;   // of tiles
  int32_t start;   // the block with turn 0
  bool by_head;    // the tiles of a head are consecutive
  bool backwards;  // blocks take their turns from the last to the first

  /// The turn of a block by the regular order, without a TileDeal; if it is `count` or more, the block gets no tile.
  FLASHCUTE_HD int32_t turn(int32_t block, int32_t blocks) const {
    int32_t const turn = (block + blocks - start) % blocks;
    return backwards && turn < count ? count - 1 - turn : turn;
  }

  /// In a section the long tiles come first: the last rows of all its heads, then the rows before. Where all tiles are
  /// equally long, those of one head come together: they read the same keys at about the same time. The incomplete tile
  /// is that of the first rows: under a causal mask it sees the fewest keys, and warpgroups without rows wait the
  /// least. `row_blocks`: tiles of each head.
  FLASHCUTE_HD TilePlace place(int32_t turn, int32_t row_blocks) const {
    int32_t const index = first + turn;
    if (by_head) return {head0 + static_cast<uint32_t>(index / row_blocks), index % row_blocks};
    return {head0 + static_cast<uint32_t>(index % heads), index / heads};
  }
};

/// Heads are divided into sections, whose K and V should stay in the L2 cache, and the tiles of a section into rounds,
/// every other one backwards, so that a block with a long tile gets a short one next. The next section continues with
/// the block after the last that got a tile. The last section is larger, so that there are short tiles at the end for
/// the blocks with the least work so far. If all tiles are equally long (`per_section` 0), there is one section. (Tiles
/// of packed sequences are distributed otherwise: sm90/tile_order.hpp.)
class TileRounds {
 public:
  /// `row_blocks`: tiles of each head.
  FLASHCUTE_HD TileRounds(ForwardParams const& p, int32_t row_blocks, int32_t blocks, SectionRounds per_section)
      : blocks_(blocks),
        row_blocks_(row_blocks),
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
      // So that the incomplete tiles of the heads do not all go to the same block.
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

/// The turns of the last rounds, computed by the host: each tile goes to the block with the least work so far. The
/// rounds before `first_round` follow TileRound::turn.
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
