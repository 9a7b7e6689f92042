// The CPU backend's forward pass.
#pragma once

#include "flashcute/core/forward_config.hpp"
#include "flashcute/core/forward_params.hpp"

namespace flashcute::cpu {

/// Computes the forward pass on host memory and returns when it is done. `config` gives the dtype and
/// the tile (block_m, block_n), `params.head_dim <= config.head_dim`, the same of head_dim_v. The result is the same,
/// bit for bit, whatever the number of threads.
void forward(ForwardConfig const& config, Features const& features, ForwardParams const& params);

/// The instruction set in use: "avx512", "avx2" or "baseline"; FLASHCUTE_CPU_ISA, or the best that this CPU has.
char const* isa();

/// How many threads a call uses: FLASHCUTE_NUM_THREADS, else one for each CPU that the process may use
/// (available_cpus).
int num_threads();

}  // namespace flashcute::cpu
