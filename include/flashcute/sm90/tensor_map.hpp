// The tensor map (CUtensorMap) that describes a tensor to TMA: encoded by the CUDA driver, opaque to the code of host
// and device.
#pragma once

#include "flashcute/core/std.hpp"

namespace flashcute {

struct alignas(128) TensorMap {
  uint64_t opaque[16];
};
static_assert(sizeof(TensorMap) == 128);

/// A tile lies in shared memory in pages, each of which holds some columns of all rows. TMA copies a page as one box,
/// and exchanges its pieces of 16 bytes (swizzle) as WGMMA expects it. Bytes of a page's rows, where `row_bytes` are
/// those of the tile's: the most that can be swizzled, or half of it where that would leave a rest.
constexpr int32_t page_bytes(int32_t row_bytes) { return row_bytes % 128 == 0 ? 128 : 64; }

}  // namespace flashcute
