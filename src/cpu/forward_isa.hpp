// What each instruction set's file offers to dispatch.cpp: one function, the only symbol it exports.
#pragma once

#include "flashcute/core/forward_config.hpp"
#include "flashcute/core/forward_params.hpp"

namespace flashcute::cpu {

/// Computes tile `index` of QueryTile::count. `scratch` holds ForwardScratch::of(config).elements of
/// the accumulation type, aligned to scratch_alignment.
using ForwardTileFunction = void (*)(ForwardConfig const& config, ForwardParams const& params, int64_t index,
                                     void* scratch);

namespace baseline {
ForwardTileFunction forward_tile(ForwardConfig const& config, Features const& features);
}
namespace avx2 {
ForwardTileFunction forward_tile(ForwardConfig const& config, Features const& features);
}
namespace avx512 {
ForwardTileFunction forward_tile(ForwardConfig const& config, Features const& features);
}

}  // namespace flashcute::cpu
