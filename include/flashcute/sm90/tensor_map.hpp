// The tensor map (CUtensorMap) that describes a tensor to TMA: encoded by the CUDA driver, opaque to the code of host
// and device.
#pragma once

#include "flashcute/core/std.hpp"

namespace flashcute {

struct alignas(128) TensorMap {
  uint64_t opaque[16];
};
static_assert(sizeof(TensorMap) == 128);

/// Bytes of a row of a box: the widest that TMA can swizzle.
inline constexpr int32_t box_row_bytes = 128;

}  // namespace flashcute
