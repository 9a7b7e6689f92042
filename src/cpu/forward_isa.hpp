// The one function of the forward that each instruction set's object file exports, for dispatch.cpp.
#pragma once

#include "cpu/mask_functions.hpp"

namespace flashcute::cpu {

/// Computes tile `index` of count_query_tiles. `scratch` has room for ForwardScratch::of(config).elements of
/// the accumulation type, aligned to scratch_alignment.
using ForwardTileFunction = void (*)(ForwardConfig const& config, MaskFunctions const& mask,
                                     ForwardParams const& params, int64_t index, void* scratch);

namespace baseline {
ForwardTileFunction forward_tile(DType dtype);
}
namespace avx2 {
ForwardTileFunction forward_tile(DType dtype);
}
namespace avx512 {
ForwardTileFunction forward_tile(DType dtype);
}

}  // namespace flashcute::cpu
