// A mask as tiles ask for it: by functions, so that one tile serves every kind of mask. They are those of `Mask<kind>`
// in mask.hpp, which stays the only place that knows who sees whom; dispatch.cpp takes them from there.
#pragma once

#include "flashcute/policy/mask.hpp"

namespace flashcute::cpu {

/// A mask under which each query sees neighbouring keys. A tile makes a call for itself or for a block, never for an
/// element.
struct MaskFunctions {
  BandRange (*kv_range)(QueryTile const& tile, ForwardParams const& p, int32_t block_n);
  QueryBandRange (*query_range)(KeyTile const& tile, ForwardParams const& p, int32_t block_m);
  /// Writes to `to` which keys each of the queries [query0, query0 + count) sees.
  void (*keys_of_queries)(int32_t query0, int32_t count, Sequence const& sequence, RowRange* to);
};

}  // namespace flashcute::cpu
