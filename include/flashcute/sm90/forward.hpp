// FlashAttention forward on Hopper: a persistent kernel with specialised warps. One warp loads tiles by TMA, one may
// scout for what they see; one to three warpgroups compute, each 64 query rows, with WGMMA. A thread block computes
// tiles of query rows of one head, one after the other.
// Source: Shah et al., "FlashAttention-3", arXiv 2407.08608, algorithms 1 and 2.
#pragma once

#include "flashcute/sm90/consumer.hpp"
#include "flashcute/sm90/inspector.hpp"
#include "flashcute/sm90/loader.hpp"
#include "flashcute/sm90/schedule.hpp"
#include "flashcute/sm90/scout.hpp"

namespace flashcute::sm90 {

template <ForwardKernelId Id>
struct ForwardPass {
  static constexpr ForwardConfig C = Id.config;
#define FLASHCUTE_RULE(id, sentence) static_assert(check(C, sm90_arch) != ForwardConfigError::id, sentence);
  FLASHCUTE_FORWARD_CONFIG_RULES(FLASHCUTE_RULE)
#undef FLASHCUTE_RULE
  static_assert(has_only<&Features::mask, &Features::count_blocks>(Id.features), FLASHCUTE_UNKNOWN_FEATURE);

  using Mask = flashcute::Mask<Id.features.mask>;
  using Tile = QueryTile<typename Mask::Sequence>;
  using L = ForwardLayout<C, Mask>;
  using Storage = typename L::SharedStorage;
  static constexpr WarpgroupRegisters registers = registers_of(C);

  FLASHCUTE_DEVICE static void run(Sm90ForwardParams const& p, Storage& smem_symbol) {
    Storage& smem = hidden(smem_symbol);
    if (thread_index() == 0) Tiles<C, Mask>::init(smem, Mask::rows_differ);
    TileSchedule<Id>::prepare(p.forward, smem);
    if constexpr (C.cluster > 1) {
      cluster_sync();  // all mbarriers of the cluster are initialised, and its tiles sorted
    } else {
      block_sync();
    }

    if constexpr (!Mask::two_edges) {
      // Before setmaxnreg: this needs more registers than the loading warpgroup keeps.
      if (Mask::has_empty_rows(UniformSequence(p.forward, {}, 0)) && thread_index() < 32) store_empty_tiles(p.forward);
    }

    // nvcc handles setmaxnreg well only in this form: one if/else, whose branches each set the number of registers.
    int const warpgroup = warpgroup_index();
    if (warpgroup == 0) {
      release_registers<registers.loader>();
      if (warp_of_warpgroup() != 0) {
        if constexpr (L::scouts) {
          if (warp_of_warpgroup() > L::inspecting_warps) return Scout<Id>::run(p, smem);
        }
        if (Mask::rows_differ) Inspector<C, Mask>::run(smem);
      } else if (elected_lane()) {
        load(p, smem);
      }
    } else {
      claim_registers<registers.consumer>();
      Consumer<Id>{p.forward, smem, warpgroup - 1}.run();
      if constexpr (C.cluster > 1) cluster_sync();  // until then other blocks write to this one's shared memory
    }
  }

 private:
  FLASHCUTE_DEVICE static void load(Sm90ForwardParams const& p, Storage& smem) {
    Loader<C, Mask> loader{p, smem};
    if constexpr (L::scouts) {
      load_what_is_found(loader, smem);
    } else {
      TileSchedule<Id> schedule{p, smem};
      for (Tile tile; schedule.next(tile);) {
        auto const range = Mask::kv_range(tile, p.forward, C.block_n);
        if (!range.empty()) loader.load(tile, range);
      }
    }
    loader.finish();
  }

  FLASHCUTE_DEVICE static void load_what_is_found(Loader<C, Mask>& loader, Storage& smem) {
    for (RingPosition<L::found_places> ring;; ring.advance()) {
      barrier_wait(smem.scouted.full[ring.place], ring.parity);
      Found<Mask> const& found = smem.scouted.found[ring.place];
      if (!found.exists) return;
      if constexpr (Mask::Range::contiguous) {
        auto const tile = found.tile;
        auto const range = found.seen;
        barrier_arrive(smem.scouted.empty[ring.place]);
        if (range.empty()) {
          loader.pass_over(tile);
        } else {
          loader.load(tile, range);
        }
      } else {
        if (found.blocks.visited == 0) {
          loader.pass_over(found.tile);
        } else {
          loader.load_page(found);
        }
        barrier_arrive(smem.scouted.empty[ring.place]);
      }
    }
  }

  /// Writes the tiles that see no key under a mask with one edge, which the loader leaves out. If the first row sees a
  /// key, there are none. (Under other masks they are anywhere, and the warpgroups write them in their turn.)
  FLASHCUTE_DEVICE static void store_empty_tiles(ForwardParams const& p) {
    // (Not count_query_tiles, which would ask whether sequences are packed: under such masks they are not.)
    int64_t const count = static_cast<int64_t>(p.batch) * p.heads * ceil_div<int64_t>(p.seqlen_q, L::tile_rows);
    auto const per_head = static_cast<uint32_t>(ceil_div(p.seqlen_q, L::tile_rows));
    for (int64_t i = block_index(); i < count; i += block_count()) {
      auto const index = static_cast<uint32_t>(i);
      auto const tile =
          QueryTile<UniformSequence>::from_end(p, index / per_head, static_cast<int>(index % per_head), L::tile_rows);
      if (!Mask::kv_range(tile, p, C.block_n).empty()) continue;
      store_empty<C, Mask>(p, tile, static_cast<int>(thread_index()) % 32, 32);
      if (thread_index() == 0) store_counts<Id>({}, p, tile);
    }
  }
};

}  // namespace flashcute::sm90
