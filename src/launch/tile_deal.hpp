// Which thread block of Hopper's kernel computes which tiles.
#pragma once

#include "flashcute/core/forward_config.hpp"
#include "flashcute/sm90/rounds.hpp"

namespace flashcute {

/// How many clusters of thread blocks, mostly of one, run at once, and no more than there are tiles.
int32_t persistent_clusters(ForwardConfig const& config, int64_t tiles, int32_t multiprocessors);

/// Deals a launch's tiles to `blocks` thread blocks, or clusters. Under a mask by what each has to do so far. Each
/// thread remembers its last deals, of 2.3 KB: a call with the sizes of one of them costs nothing.
inline constexpr std::size_t remembered_deals = 8;
TileDeal const& deal_tiles(ForwardKernelId const& kernel, ForwardParams const& params, int32_t blocks);

}  // namespace flashcute
