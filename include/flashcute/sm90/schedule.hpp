// The sequence of tiles that a thread block, or a cluster, computes.
#pragma once

#include "flashcute/policy/mask.hpp"
#include "flashcute/sm90/instructions.hpp"

namespace flashcute::sm90 {

template <ForwardKernelId Id>
class TileSchedule {
  static constexpr ForwardConfig C = Id.config;
  using Sequence = typename Mask<Id.features.mask>::Sequence;
  using Tile = QueryTile<Sequence>;

 public:
  FLASHCUTE_DEVICE explicit TileSchedule(Sm90ForwardParams const& p)
      : p_(p),
        blocks_(static_cast<int>(block_count()) / C.cluster),
        rounds_(p.forward, Tile::blocks_of_head(p.forward, rows), blocks_, per_section,
                Sequence::is_packed(p.forward)) {}

  /// Sets `tile` to the next one; false if there is none.
  FLASHCUTE_DEVICE bool next(Tile& tile) {
    for (TileRound round; rounds_.next(round);) {
      int const turn = p_.deal.turn(index_++, round, static_cast<int>(block_index()) / C.cluster, blocks_);
      if (turn >= round.count) continue;
      tile = round.tile<Sequence>(p_.forward, turn, rows, sequence_);
      sequence_ = tile.entry.number;
      if (!Sequence::fills_tensors && tile.rows == 0) continue;  // a slot that no sequence needs
      return true;
    }
    return false;
  }

 private:
  static constexpr int rows = tile_rows(C);
  static constexpr SectionRounds per_section = section_rounds(Id);

  Sm90ForwardParams const& p_;
  int blocks_;  // or clusters
  TileRounds rounds_;
  int index_ = 0;     // of the next round
  int sequence_ = 0;  // of the last tile; those of later rounds come after it
};

}  // namespace flashcute::sm90
