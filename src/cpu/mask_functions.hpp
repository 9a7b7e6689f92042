// A mask as a table of functions, so that one compiled tile serves every kind of mask. dispatch.cpp fills it from
// `Mask<kind>` in policy/mask.hpp, the only definition of masks.
#pragma once

#include "flashcute/policy/mask.hpp"

namespace flashcute::cpu {

/// The sequence of a batch entry under any mask: its lengths may lie in memory, it may be packed, and there may be a
/// map.
class AnySequence : public MappedSequence {
 public:
  using MappedSequence::MappedSequence;
  FLASHCUTE_HD static bool is_packed(ForwardParams const& p) { return BatchSequence::is_packed(p); }
};

using Queries = QueryTile<AnySequence>;
using Keys = KeyTile<AnySequence>;

/// Of every mask, the ranges of a mask with a map: one tile serves all. A tile calls these once for itself or for a
/// block, never for an element.
struct MaskFunctions {
  MapBlocks (*kv_range)(Queries const& tile, ForwardParams const& p, int32_t block_n);
  /// Of the first query head of the group.
  MapQueryBlocks (*query_range)(Keys const& tile, ForwardParams const& p, int32_t block_m);
  /// Writes to `to` between which keys those lie that each of the queries [query0, query0 + count) sees; if there is no
  /// map, it sees all of them.
  void (*keys_of_queries)(int32_t query0, int32_t count, AnySequence const& sequence, RowRange* to);
};

}  // namespace flashcute::cpu
