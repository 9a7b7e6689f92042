// The CPU backend's forward pass.
#pragma once

#include "flashcute/core/forward_config.hpp"
#include "flashcute/core/forward_params.hpp"

namespace flashcute::cpu {

/// Computes the forward pass on host memory and returns when it is done. `config` gives the dtype and
/// the tile (block_m, block_n), `params.head_dim <= config.head_dim`, the same of head_dim_v. The result is the same,
/// bit for bit, whatever the number of threads.
void forward(ForwardConfig const& config, Features const& features, ForwardParams const& params);

/// What runs here: "avx512", "avx2" or "baseline". The best that this CPU has, or FLASHCUTE_CPU_ISA.
char const* isa();

/// How many threads a call uses: FLASHCUTE_NUM_THREADS, else one for each core that is this process's.
int num_threads();

}  // namespace flashcute::cpu
