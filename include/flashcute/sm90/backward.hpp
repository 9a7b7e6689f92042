// The gradients on Hopper: one launch between two small ones. A thread block computes tiles of 128 keys of one head,
// one after the other. One of its warps loads blocks of Q and dO by TMA, two warpgroups compute with WGMMA, and two
// warps add dQ of each block to sums in fp32, by bulk reductions. Source: Shah et al., "FlashAttention-3", arXiv
// 2407.08608, section B.1; the order of products is ours (docs/kernels/sm90_backward.md).
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
  using L = BackwardLayout<C>;
  using Storage = StorageWithTiles<L, typename Mask::Sequence>;
  static_assert(sizeof(Storage) <= sm90_smem_bytes(C));

  FLASHCUTE_DEVICE static void run(Sm90BackwardParams const& p, Storage& smem_symbol) {
    Storage& smem = hidden(smem_symbol);
    if (thread_index() == 0) smem.init(Mask::rows_differ);
    block_sync();  // the mbarriers are initialised
    int const warpgroup = warpgroup_index();
    if (warpgroup == 0) {
      release_registers<serving_registers>();
      int const warp = warp_of_warpgroup();
      if (warp == 0) {
        if (elected_lane()) GradientLoader<Id>::run(p, smem);
      } else if (warp <= L::warpgroups) {
        DqAdder<Id>::run(p.backward, smem, warp - 1);
      } else if (Mask::rows_differ) {
        GradientInspector<Id>::run(p.backward, smem);
      }
    } else {
      claim_registers<computing_registers>();
      GradientConsumer<Id>{p.backward, smem, warpgroup - 1}.run();
    }
  }
};

}  // namespace flashcute::sm90
