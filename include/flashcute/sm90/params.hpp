// The parameters of launches of Hopper's kernels, passed by value as their only parameter.
#pragma once

#include "flashcute/core/backward_params.hpp"
#include "flashcute/sm90/rounds.hpp"
#include "flashcute/sm90/tensor_map.hpp"

namespace flashcute {

// The maps see tensors as (columns, rows, heads, batch).

struct Sm90ForwardParams {
  TensorMap q, k, v;
  ForwardParams forward;
  TileDeal deal;
};
static_assert(sizeof(TileDeal) == 2308);
static_assert(sizeof(Sm90ForwardParams) == 3200);

/// Of the passes that multiply.
struct Sm90BackwardParams {
  TensorMap q, k, v, dout;
  BackwardParams backward;
};
static_assert(sizeof(Sm90BackwardParams) == 1152);

}  // namespace flashcute
