// The sequence of tiles that a thread block, or a cluster, computes.
#pragma once

#include "flashcute/sm90/layout.hpp"

namespace flashcute::sm90 {

template <ForwardKernelId Id>
class TileSchedule {
  static constexpr ForwardConfig C = Id.config;
  using Mask = flashcute::Mask<Id.features.mask>;
  using Sequence = typename Mask::Sequence;
  using Tile = QueryTile<Sequence>;
  using Order = TileOrder<C, Mask>;
  using Storage = typename ForwardLayout<C, Mask>::SharedStorage;

 public:
  /// Before the first tile is loaded: sorts tiles whose costs the host does not know. All threads call it, and
  /// synchronise before any goes on.
  FLASHCUTE_DEVICE static void prepare(ForwardParams const& p, Storage& smem) {
    if constexpr (!Sequence::fills_tensors) {
      Order::prepare(p, block(), blocks(), smem.q, smem.own_tiles);
    }
  }

  FLASHCUTE_DEVICE TileSchedule(Sm90ForwardParams const& p, Storage const& smem)
      : p_(p), smem_(smem), blocks_(blocks()), rounds_(p.forward, row_blocks(), blocks_, per_section) {}

  /// Sets `tile` to the next one; false if there is none.
  FLASHCUTE_DEVICE bool next(Tile& tile) {
    for (TilePlace place; next_place(place);) {
      tile = place.template tile<Tile>(p_.forward, rows);
      sequence_ = tile.entry.number;
      if (!Sequence::fills_tensors && tile.rows == 0) continue;  // a slot that no sequence needs
      return true;
    }
    return false;
  }

 private:
  static constexpr int rows = tile_rows(C);
  static constexpr SectionRounds per_section = section_rounds(Id);

  FLASHCUTE_DEVICE bool next_place(TilePlace& place) {
    if constexpr (!Sequence::fills_tensors) {
      place.near = sequence_;
      if (Order::decides(p_.forward, smem_.own_tiles)) {
        return Order::find(p_.forward, index_, block(), blocks_, smem_.own_tiles, place);
      }
    }
    for (TileRound round; rounds_.next(round);) {
      int const turn = p_.deal.turn(index_++, round, block(), blocks_);
      if (turn >= round.count) continue;
      place = round.place(turn, row_blocks());
      return true;
    }
    return false;
  }

  FLASHCUTE_DEVICE int row_blocks() const { return ceil_div(p_.forward.seqlen_q, rows); }

  // Of thread blocks, or of clusters.
  FLASHCUTE_DEVICE static int blocks() { return static_cast<int>(block_count()) / C.cluster; }
  FLASHCUTE_DEVICE static int block() { return static_cast<int>(block_index()) / C.cluster; }

  Sm90ForwardParams const& p_;
  Storage const& smem_;
  int blocks_;
  TileRounds rounds_;
  int index_ = 0;     // of the next round, or of the block's next tile
  int sequence_ = 0;  // of the last tile
};

}  // namespace flashcute::sm90
