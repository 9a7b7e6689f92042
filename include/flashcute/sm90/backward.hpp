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
  using Storage = typename L::SharedStorage;
  static constexpr int threads = num_threads(Id);

  FLASHCUTE_DEVICE static void run(Sm90BackwardParams const& p, Storage& smem_symbol) {
    PassesInTurn<C>::begin_next();
    Storage& smem = hidden(smem_symbol);
    if (thread_index() == 0) L::init(smem);
    auto const tile = Tile::at(p.backward.forward, DqOrder<Id>::tile_number(p.backward, smem), C.block_n);
    if (Mask::query_range(tile, p.backward.forward, C.block_m).empty()) return store_nothing(p.backward, tile);
    block_sync();  // the mbarriers are initialised

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

 private:
  /// Of keys that no query sees.
  FLASHCUTE_DEVICE static void store_nothing(BackwardParams const& p, Tile const& tile) {
    PassesInTurn<C>::await_before();
    clear(tile, p.dk, p.dk_stride, p.forward.head_dim);
    clear(tile, p.dv, p.dv_stride, p.forward.head_dim_v);
  }

  FLASHCUTE_DEVICE static void clear(Tile const& tile, void* gradient, Strides const& stride, int columns) {
    using Element = typename L::Element;
    auto* const first = static_cast<Element*>(gradient) +
                        row_offset(stride, tile.entry.batch, tile.kv_head, tile.entry.first_key + tile.row0);
    int const vectors = columns / 8;  // 16 bytes each
    for (int i = thread_index(); i < tile.rows * vectors; i += threads) {
      global_store(first + i / vectors * stride.row + i % vectors * 8, uint4{});
    }
  }
};

}  // namespace flashcute::sm90
