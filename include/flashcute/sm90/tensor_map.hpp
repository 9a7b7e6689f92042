// How Hopper's copy engine sees a tensor: written by the host's driver, read by the engine, opaque to both sides' code.
#pragma once

#include "flashcute/core/std.hpp"

namespace flashcute {

struct alignas(128) TensorMap {
  uint64_t opaque[16];
};
static_assert(sizeof(TensorMap) == 128);

/// Of one row of a box, in bytes: the widest that the engine swizzles.
inline constexpr int32_t box_row_bytes = 128;

}  // namespace flashcute
