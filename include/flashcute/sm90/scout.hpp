// The scouting warp of Hopper's forward: where lengths of sequences or a block map may say what a tile sees, it reads
// them ahead of the loading lane, and tells in shared memory what it has found. The loading lane, which has few
// registers and should wait for copies alone, takes it from there.
#pragma once

#include "flashcute/sm90/schedule.hpp"

namespace flashcute::sm90 {

template <ForwardKernelId Id>
class Scout {
  static constexpr ForwardConfig C = Id.config;
  using Mask = flashcute::Mask<Id.features.mask>;
  using Tile = QueryTile<typename Mask::Sequence>;
  using L = ForwardLayout<C, Mask>;
  using Storage = typename L::SharedStorage;

 public:
  /// All lanes of the warp call it.
  FLASHCUTE_DEVICE static void run(Sm90ForwardParams const& p, Storage& smem) {
    Scout scout{smem};
    TileSchedule<Id> schedule{p, smem};
    for (Tile tile; schedule.next(tile);) {
      if constexpr (Mask::Range::contiguous) {
        scout.tell(0, {.tile = tile, .seen = Mask::kv_range(tile, p.forward, C.block_n), .exists = true});
      } else {
        scout.tell_pages(tile, Mask::pages(tile, p.forward, C.block_n));
      }
    }
    scout.tell(0, {.exists = false});
  }

 private:
  FLASHCUTE_DEVICE explicit Scout(Storage& smem) : smem_(smem) {}

  /// Under a map: the pages of a tile in which some block is visited, from the last to the first; or one in which none
  /// is. Each lane reads a page.
  FLASHCUTE_DEVICE void tell_pages(Tile const& tile, MapPages const& pages) {
    bool first = true;
    for (int end = pages.end_page(); end > pages.first_page(); end -= 32) {
      int const number = end - 1 - lane();
      MapPages::Page const page = read(pages, number);
      uint32_t lanes = lanes_with(page.visited != 0);
      if (lanes == 0) continue;
      bool const more = any_before(pages, end - 32);
      while (lanes != 0) {
        int const next = lowest_bit(lanes);
        lanes &= lanes - 1;
        tell(next, {tile, pages.band(), true, number, page, first, lanes == 0 && !more});
        first = false;
      }
    }
    if (first) tell(0, {.tile = tile, .exists = true});
  }

  FLASHCUTE_DEVICE static MapPages::Page read(MapPages const& pages, int number) {
    return number >= pages.first_page() ? pages.read(number) : MapPages::Page{0, 0};
  }

  /// Whether some block of the pages before `end` is visited.
  FLASHCUTE_DEVICE static bool any_before(MapPages const& pages, int end) {
    for (; end > pages.first_page(); end -= 32) {
      if (lanes_with(read(pages, end - 1 - lane()).visited != 0) != 0) return true;
    }
    return false;
  }

  /// Tells what lane `of_lane` has found. What the other lanes pass is ignored.
  FLASHCUTE_DEVICE void tell(int of_lane, Found<Mask> const& found) {
    barrier_wait(smem_.scouted.empty[ring_.place], ring_.parity ^ 1);
    reconverge();  // no lane is still waiting: once it is told, the place may become full and empty again
    if (lane() == of_lane) {
      smem_.scouted.found[ring_.place] = found;
      barrier_arrive(smem_.scouted.full[ring_.place]);
    }
    ring_.advance();
  }

  FLASHCUTE_DEVICE static int lane() { return thread_index() % 32; }

  Storage& smem_;
  RingPosition<L::found_places> ring_;
};

}  // namespace flashcute::sm90
