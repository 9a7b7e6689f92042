// Which tiles a thread block computes, one after the other. All of its warps walk the same list; no counter in memory
// deals tiles out, so nothing has to be cleared, and every launch is the same.
#pragma once

#include "flashcute/mask.hpp"
#include "flashcute/sm90/instructions.hpp"

namespace flashcute::sm90 {

/// Heads are taken in sections, whose K and V shall stay in the L2 cache; in a section the long tiles come first. The
/// blocks are dealt a section's tiles in rounds, every other one backwards, so that who got a long tile gets a short
/// one next. The next section goes on with the block after the last that got one.
template <ForwardConfig C>
class TileSchedule {
 public:
  FLASHCUTE_DEVICE explicit TileSchedule(ForwardParams const& p)
      : p_(p),
        blocks_(static_cast<int>(block_count())),
        row_blocks_(ceil_div(p.seqlen_q, C.block_m)),
        section_(max_of(1, (rounds * blocks_ + row_blocks_ / 2) / row_blocks_)),
        turn_(static_cast<int>(block_index())) {}

  /// Sets `tile` to this block's next one; false if there is none.
  FLASHCUTE_DEVICE bool next(QueryTile& tile) {
    int const all_heads = p_.batch * p_.heads;
    while (head0_ < all_heads) {
      int const heads = min_of(section_, all_heads - head0_);
      int const tiles = heads * row_blocks_;
      if (first_ >= tiles) {
        turn_ = (turn_ + blocks_ - tiles % blocks_) % blocks_;
        head0_ += section_;
        first_ = 0;
        backwards_ = false;
        continue;
      }
      int const dealt = min_of(blocks_, tiles - first_);
      int const index = first_ + (backwards_ ? dealt - 1 - turn_ : turn_);
      first_ += blocks_;
      backwards_ = !backwards_;
      if (turn_ >= dealt) continue;
      tile =
          QueryTile::of(p_, static_cast<uint32_t>(head0_ + index % heads), row_blocks_ - 1 - index / heads, C.block_m);
      return true;
    }
    return false;
  }

 private:
  static constexpr int rounds = rounds_per_section(C);

  ForwardParams const& p_;
  int blocks_, row_blocks_;
  int section_;    // heads
  int turn_;       // of this block in the rounds of the section
  int head0_ = 0;  // the section's first
  int first_ = 0;  // tile of the section that the round begins with
  bool backwards_ = false;
};

}  // namespace flashcute::sm90
