// The default configurations: one table, in which every entry says what chose it.
#pragma once

#include "flashcute/config.hpp"

namespace flashcute {

/// Whether there are blocks enough for every multiprocessor of the GPU.
enum class Grid : uint8_t { large, small };

/// The tile of a GPU kernel for head dimensions up to a bucket's width. block_n changes the bits of a result, the
/// rest does not (but see docs/decisions/0003-tiles.md about infinity in V); so the tiles of a bucket have one block_n,
/// and a row's result does not depend on its batch mates.
struct ForwardTile {
  int32_t element_bytes;  // 2: float16, bfloat16; 4: float32
  Math math;
  int32_t head_dim;  // the bucket: serves head dimensions up to it
  Grid grid;
  int32_t block_m, block_n, num_warps, blocks_per_sm;
  bool q_in_registers;
  int32_t stages;
  char const* chosen_by;
};

/// All stay under the 99 KB of shared memory that compute capabilities 8.6, 8.9 and 12.0 allow, so that one
/// choice serves every GPU.
inline constexpr ForwardTile forward_tiles[] = {
    {2, Math::tensor_core, 64, Grid::large, 128, 64, 4, 2, true, 2, "times on an H200: docs/sm80_forward.md"},
    {2, Math::tensor_core, 64, Grid::small, 64, 64, 4, 3, false, 1, "twice the blocks; not yet measured on a GPU"},
    {2, Math::tensor_core, 128, Grid::large, 128, 64, 4, 2, false, 1, "times on an H200: docs/sm80_forward.md"},
    {2, Math::tensor_core, 128, Grid::small, 32, 64, 2, 4, false, 1, "four times the blocks; not yet measured on a GPU"},
    {2, Math::tensor_core, 256, Grid::large, 64, 64, 4, 2, false, 1, "times on an H200: docs/sm80_forward.md"},
    {4, Math::cuda_core, 64, Grid::large, 128, 32, 4, 2, false, 1, "counts of instructions; not yet measured on a GPU"},
    {4, Math::cuda_core, 128, Grid::large, 64, 32, 4, 2, false, 1, "registers: 128 rows spill; not yet measured"},
    {4, Math::cuda_core, 256, Grid::large, 32, 16, 2, 3, false, 1, "registers: 64 rows spill on 8.0; not yet measured"},
    {4, Math::tensor_core, 64, Grid::large, 128, 32, 4, 2, false, 1, "registers; not yet measured on a GPU"},
    {4, Math::tensor_core, 128, Grid::large, 64, 32, 4, 2, false, 1, "registers; not yet measured on a GPU"},
    {4, Math::tensor_core, 256, Grid::large, 64, 16, 4, 2, false, 1, "shared memory; not yet measured on a GPU"},
};

/// The entry for tensors whose wider head dimension is `d`, at most 256. Not every bucket has one for small grids.
constexpr ForwardTile const& forward_tile(DType dtype, Math math, int32_t d, Grid grid) {
  ForwardTile const* chosen = &forward_tiles[0];  // only for types without a kernel, which `check` will refuse
  int32_t width = 0;
  for (auto const& tile : forward_tiles) {
    if (tile.element_bytes != size_of(dtype) || tile.math != math || tile.head_dim < d) continue;
    if (width != 0 && tile.head_dim != width) break;  // the buckets are in order
    width = tile.head_dim;
    if (tile.grid == Grid::large || tile.grid == grid) chosen = &tile;
  }
  return *chosen;
}

/// What a default configuration depends on.
struct ForwardTensors {
  DType dtype;
  int32_t head_dim, head_dim_v;
  int32_t alignment = 16;   // in bytes, of addresses, strides and rows: 16, 8, 4 or 2
  bool allow_tf32 = false;  // float32 on tensor cores
  int64_t heads = 0;        // of all batches; 0: very many
  int32_t seqlen_q = 0;
};

constexpr Grid grid_of(ForwardTensors const& t, ForwardTile const& tile, int32_t multiprocessors) {
  bool const small = t.heads > 0 && t.heads * ceil_div(t.seqlen_q, tile.block_m) < multiprocessors;
  return small ? Grid::small : Grid::large;
}

/// For a GPU: of how many multiprocessors (0: it does not matter).
constexpr ForwardConfig default_forward_config(ForwardTensors const& t, Arch arch, int32_t multiprocessors = 0) {
  if (arch == cpu_arch) {
    return {.dtype = t.dtype, .head_dim = t.head_dim, .head_dim_v = t.head_dim_v, .block_m = 64, .block_n = 128};
  }
  Math const math = size_of(t.dtype) == 2 || t.allow_tf32 ? Math::tensor_core : Math::cuda_core;
  int32_t const d = max_of(t.head_dim, t.head_dim_v);
  Grid const grid = grid_of(t, forward_tile(t.dtype, math, d, Grid::large), multiprocessors);
  ForwardTile const& tile = forward_tile(t.dtype, math, d, grid);
  return {.dtype = t.dtype,
          .head_dim = tile.head_dim,
          .block_m = tile.block_m,
          .block_n = tile.block_n,
          .num_warps = tile.num_warps,
          .blocks_per_sm = tile.blocks_per_sm,
          .math = math,
          .stages = tile.stages,
          .copy_bytes = t.alignment,
          .async_copy = t.alignment >= 4,
          .q_in_registers = tile.q_in_registers};
}

/// With work for the whole GPU.
constexpr ForwardConfig default_forward_config(DType dtype, int32_t d, Arch arch) {
  return default_forward_config({dtype, d, d}, arch);
}

/// With work for a part of it.
constexpr ForwardConfig small_grid_forward_config(DType dtype, int32_t d, Arch arch) {
  return default_forward_config({.dtype = dtype, .head_dim = d, .head_dim_v = d, .heads = 1, .seqlen_q = 1}, arch, 2);
}

}  // namespace flashcute
