// A mask as a table of functions, so that one compiled tile serves every kind of mask. dispatch.cpp fills it from
// `Mask<kind>` in policy/mask.hpp, the only definition of masks.
#pragma once

#include "flashcute/policy/mask.hpp"

namespace flashcute::cpu {

// The tiles of every mask, of sequences whose lengths may lie in memory.
using Queries = QueryTile<BatchSequence>;
using Keys = KeyTile<BatchSequence>;

/// For masks under which the keys of each query are contiguous. A tile calls these once for itself or for a block,
/// never for an element.
struct MaskFunctions {
  BandRange (*kv_range)(Queries const& tile, ForwardParams const& p, int32_t block_n);
  QueryBandRange (*query_range)(Keys const& tile, ForwardParams const& p, int32_t block_m);
  /// Writes to `to` which keys each of the queries [query0, query0 + count) sees.
  void (*keys_of_queries)(int32_t query0, int32_t count, BatchSequence const& sequence, RowRange* to);
};

}  // namespace flashcute::cpu
