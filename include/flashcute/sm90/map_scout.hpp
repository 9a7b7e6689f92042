// The scouting warp of Hopper's forward under a block map. It goes through the thread block's tiles ahead of the loading
// lane, reads from memory what each sees, and tells it in shared memory: 32 blocks at a time, a page of bits. Its lanes
// read a page each. The loading lane, which has few registers, takes block after block from these bits.
#pragma once

#include "flashcute/sm90/schedule.hpp"

namespace flashcute::sm90 {

template <ForwardKernelId Id>
class MapScout {
  static constexpr ForwardConfig C = Id.config;
  using Mask = flashcute::Mask<Id.features.mask>;
  using Tile = QueryTile<typename Mask::Sequence>;
  using L = ForwardLayout<C, Mask>;
  using Storage = typename L::SharedStorage;

 public:
  /// All lanes of the warp call it.
  FLASHCUTE_DEVICE static void run(Sm90ForwardParams const& p, Storage& smem) {
    MapScout scout{smem};
    TileSchedule<Id> schedule{p, smem};
    for (Tile tile; schedule.next(tile);) scout.tell(tile, Mask::pages(tile, p.forward, C.block_n));
    scout.tell_page(0, {.exists = false});
  }

 private:
  FLASHCUTE_DEVICE explicit MapScout(Storage& smem) : smem_(smem) {}

  /// The pages of a tile in which some block is visited, from the last to the first; or one in which none is.
  FLASHCUTE_DEVICE void tell(Tile const& tile, MapPages const& pages) {
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
        tell_page(next, {tile, pages.band(), number, page, first, lanes == 0 && !more, true});
        first = false;
      }
    }
    if (first) tell_page(0, {.tile = tile, .exists = true});
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

  /// What this lane has found of it counts.
  FLASHCUTE_DEVICE void tell_page(int of_lane, FoundPage<Tile> const& page) {
    barrier_wait(smem_.map.page_empty[ring_.place], ring_.parity ^ 1);
    reconverge();  // no lane is still waiting: once the page is told, the place may become full and empty again
    if (lane() == of_lane) {
      smem_.map.pages[ring_.place] = page;
      barrier_arrive(smem_.map.page_full[ring_.place]);
    }
    ring_.advance();
  }

  FLASHCUTE_DEVICE static int lane() { return thread_index() % 32; }

  Storage& smem_;
  RingPosition<L::map_pages> ring_;
};

}  // namespace flashcute::sm90
