// The gradients on Hopper: one launch between two small ones. A thread block owns 128 keys of one head. One of its
// warps loads blocks of Q and dO by TMA, two warpgroups compute with WGMMA, and two warps add dQ of each block to sums
// in fp32, by bulk reductions. Source: Shah et al., "FlashAttention-3", arXiv 2407.08608, section B.1; the order of
// products is ours (docs/kernels/sm90_backward.md).
#pragma once

#include "flashcute/sm90/backward_consumer.hpp"
#include "flashcute/sm90/backward_loader.hpp"

namespace flashcute::sm90 {

template <BackwardKernelId Id>
struct KeyGradients {
  static constexpr BackwardConfig C = Id.config;
#define FLASHCUTE_RULE(id, sentence) static_assert(check(C, sm90_arch) != BackwardConfigError::id, sentence);
  FLASHCUTE_BACKWARD_CONFIG_RULES(FLASHCUTE_RULE)
#undef FLASHCUTE_RULE
  static_assert(has_only<&Features::mask>(Id.features), FLASHCUTE_UNKNOWN_FEATURE);

  using Mask = flashcute::Mask<Id.features.mask>;
  using Tile = KeyTile<typename Mask::Sequence>;
  using L = BackwardLayout<C>;
  using Blocks = PassingQueries<Id>;

  /// A tile that has the place and the lengths of its sequence lies here: in registers throughout it would be spilled.
  struct StorageWithTile : L::SharedStorage {
    Tile tile;
  };
  using Storage = std_::conditional_t<Mask::Sequence::fills_tensors, typename L::SharedStorage, StorageWithTile>;
  static_assert(sizeof(Storage) <= sm90_smem_bytes(C));
  static constexpr int threads = num_threads(Id);

  FLASHCUTE_DEVICE static void run(Sm90BackwardParams const& p, Storage& smem_symbol) {
    Storage& smem = hidden(smem_symbol);
    if (thread_index() == 0) {
      uint32_t clock;
      asm volatile("mov.u32 %0, %%clock;" : "=r"(clock)::"memory");
      smem.entered = clock;
      L::init(smem);
    }
    auto const tile = Tile::at(p.backward.forward, DqOrder<Id>::tile_number(p.backward, smem), C.block_n);
    if (Blocks::none(p.backward, tile)) return store_nothing<threads, typename L::Element>(p.backward, tile);
    if constexpr (Mask::Sequence::fills_tensors) {
      block_sync();  // the mbarriers are initialised
      take_roles(p, smem, tile);
    } else {
      if (thread_index() == 0) smem.tile = tile;
      block_sync();  // the mbarriers are initialised, and the tile is stored
      take_roles(p, smem, smem.tile);
    }
  }

 private:
  FLASHCUTE_DEVICE static void take_roles(Sm90BackwardParams const& p, Storage& smem, Tile const& tile) {
    int const warpgroup = warpgroup_index();
    if (warpgroup == 0) {
      release_registers<serving_registers>();
      int const warp = warp_of_warpgroup();
      if (warp == 0) {
        if (elected_lane()) GradientLoader<Id>::run(p, smem, tile);
      } else if (warp <= L::warpgroups) {
        DqAdder<Id>::run(p.backward, smem, tile, warp - 1);
      } else if (Mask::rows_differ) {
        GradientInspector<Id>::run(p.backward, smem, tile);
      }
    } else {
      claim_registers<computing_registers>();
      GradientConsumer<Id>{p.backward, smem, tile, warpgroup - 1}.run();
    }
  }
};

}  // namespace flashcute::sm90
