// Assigns tiles to the thread blocks of Hopper's kernel.
#pragma once

#include "flashcute/core/forward_config.hpp"
#include "flashcute/sm90/rounds.hpp"

namespace flashcute {

/// How many clusters (usually of one thread block each) run at once, at most one per tile.
int32_t persistent_clusters(ForwardConfig const& config, int64_t tiles, int32_t multiprocessors);

/// Assigns the tiles of a launch to `blocks` thread blocks, or clusters; under a causal mask each tile of the last
/// rounds goes to the block with the least work so far. Each thread caches its last deals, of 2.3 KB each, by their
/// sizes.
inline constexpr std::size_t remembered_deals = 8;
TileDeal const& deal_tiles(ForwardKernelId const& kernel, ForwardParams const& params, int32_t blocks);

}  // namespace flashcute
