// The sequence of tiles that a thread block, or a cluster, computes.
#pragma once

#include "flashcute/sm90/instructions.hpp"

namespace flashcute::sm90 {

template <ForwardKernelId Id>
class TileSchedule {
  static constexpr ForwardConfig C = Id.config;

 public:
  FLASHCUTE_DEVICE explicit TileSchedule(Sm90ForwardParams const& p)
      : p_(p), blocks_(static_cast<int>(block_count()) / C.cluster), rounds_(p.forward, rows, blocks_, per_section) {}

  /// Sets `tile` to the next one; false if there is none.
  template <class Sequence>
  FLASHCUTE_DEVICE bool next(QueryTile<Sequence>& tile) {
    for (TileRound round; rounds_.next(round);) {
      int const turn = p_.deal.turn(index_++, round, static_cast<int>(block_index()) / C.cluster, blocks_);
      if (turn >= round.count) continue;
      tile = round.tile<Sequence>(p_.forward, turn, rows);
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
  int index_ = 0;  // of the next round
};

}  // namespace flashcute::sm90
