// What a launch of the Hopper forward needs to know.
#pragma once

#include "flashcute/tensor_map.hpp"
#include "flashcute/tile_rounds.hpp"

namespace flashcute {

/// The maps see tensors as (columns, rows, heads, batch).
struct HopperForwardParams {
  TensorMap q, k, v;
  ForwardParams forward;
  TileDeal deal;
};
static_assert(sizeof(TileDeal) == 2308);
static_assert(sizeof(HopperForwardParams) == 2944);

}  // namespace flashcute
