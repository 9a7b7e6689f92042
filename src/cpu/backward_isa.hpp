// The one function of the backward that each instruction set's object file exports, for dispatch.cpp.
#pragma once

#include "cpu/backward_scratch.hpp"
#include "cpu/mask_functions.hpp"
#include "flashcute/core/backward_params.hpp"

namespace flashcute::cpu {

/// Computes tile `index` of count_query_tiles or count_key_tiles, by the pass. `scratch` has room for
/// BackwardScratch::of(config, pass).elements of the accumulation type, aligned to scratch_alignment.
using BackwardTileFunction = void (*)(BackwardConfig const& config, MaskFunctions const& mask,
                                      BackwardParams const& params, int64_t index, void* scratch);

namespace baseline {
BackwardTileFunction backward_tile(DType dtype, BackwardPass pass);
}
namespace avx2 {
BackwardTileFunction backward_tile(DType dtype, BackwardPass pass);
}
namespace avx512 {
BackwardTileFunction backward_tile(DType dtype, BackwardPass pass);
}

}  // namespace flashcute::cpu
