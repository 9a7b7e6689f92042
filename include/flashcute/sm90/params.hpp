// The parameters of a launch of Hopper's forward kernel, passed by value as its only parameter.
#pragma once

#include "flashcute/sm90/rounds.hpp"
#include "flashcute/sm90/tensor_map.hpp"

namespace flashcute {

/// The maps see tensors as (columns, rows, heads, batch).
struct Sm90ForwardParams {
  TensorMap q, k, v;
  ForwardParams forward;
  TileDeal deal;
};
static_assert(sizeof(TileDeal) == 2308);
static_assert(sizeof(Sm90ForwardParams) == 3200);

}  // namespace flashcute
