// The default configurations: one table, in which every entry says what chose it.
#pragma once

#include "flashcute/config.hpp"

namespace flashcute {

/// The tile of a GPU kernel for head dimensions up to a bucket's width.
struct ForwardTile {
  int32_t element_bytes;  // 2: float16, bfloat16; 4: float32
  Math math;
  int32_t head_dim;  // the bucket: serves head dimensions up to it
  int32_t block_m, block_n, num_warps;
  char const* chosen_by;
};

/// All stay under the 99 KB of shared memory that compute capabilities 8.6, 8.9 and 12.0 allow, so that one
/// choice serves every GPU.
inline constexpr ForwardTile forward_tiles[] = {
    {2, Math::tensor_core, 64, 128, 64, 4, "registers: the largest without spills; not yet measured on a GPU"},
    {2, Math::tensor_core, 128, 64, 64, 4, "registers: the largest without spills; not yet measured on a GPU"},
    {2, Math::tensor_core, 256, 64, 64, 4, "shared memory: two blocks an SM of 9.0; not yet measured on a GPU"},
    {4, Math::cuda_core, 64, 128, 32, 4, "counts of instructions; not yet measured on a GPU"},
    {4, Math::cuda_core, 128, 128, 32, 4, "counts of instructions; not yet measured on a GPU"},
    {4, Math::cuda_core, 256, 64, 16, 4, "shared memory; not yet measured on a GPU"},
    {4, Math::tensor_core, 64, 128, 32, 4, "registers; not yet measured on a GPU"},
    {4, Math::tensor_core, 128, 64, 32, 4, "registers; not yet measured on a GPU"},
    {4, Math::tensor_core, 256, 64, 16, 4, "shared memory; not yet measured on a GPU"},
};

/// The entry for tensors whose wider head dimension is `d`, at most 256.
constexpr ForwardTile const& forward_tile(DType dtype, Math math, int32_t d) {
  for (auto const& tile : forward_tiles) {
    if (tile.element_bytes == size_of(dtype) && tile.math == math && d <= tile.head_dim) return tile;
  }
  return forward_tiles[2];  // only for types without a kernel, which `check` will refuse
}

/// What a default configuration depends on.
struct ForwardTensors {
  DType dtype;
  int32_t head_dim, head_dim_v;
  int32_t alignment = 16;   // in bytes, of addresses, strides and rows: 16, 8, 4 or 2
  bool allow_tf32 = false;  // float32 on tensor cores
};

constexpr ForwardConfig default_forward_config(ForwardTensors const& t, Arch arch) {
  if (arch == cpu_arch) {
    return {.dtype = t.dtype, .head_dim = t.head_dim, .head_dim_v = t.head_dim_v, .block_m = 64, .block_n = 128};
  }
  Math const math = size_of(t.dtype) == 2 || t.allow_tf32 ? Math::tensor_core : Math::cuda_core;
  ForwardTile const& tile = forward_tile(t.dtype, math, max_of(t.head_dim, t.head_dim_v));
  return {.dtype = t.dtype,
          .head_dim = tile.head_dim,
          .block_m = tile.block_m,
          .block_n = tile.block_n,
          .num_warps = tile.num_warps,
          .math = math,
          .copy_bytes = t.alignment,
          .async_copy = t.alignment >= 4};
}

constexpr ForwardConfig default_forward_config(DType dtype, int32_t d, Arch arch) {
  return default_forward_config({dtype, d, d}, arch);
}

}  // namespace flashcute
