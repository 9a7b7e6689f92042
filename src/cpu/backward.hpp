// The CPU backend's backward pass.
#pragma once

#include "flashcute/core/backward_config.hpp"
#include "flashcute/core/backward_params.hpp"

namespace flashcute::cpu {

/// Computes dq, dk and dv on host memory and returns when it is done. `config` gives the dtype and the tile
/// (block_m, block_n); the tensors' head dims are at most the config's. `params.delta` is ignored: the
/// workspace is allocated here. The result is the same, bit for bit, whatever the number of threads.
void backward(BackwardConfig const& config, Features const& features, BackwardParams const& params);

}  // namespace flashcute::cpu
