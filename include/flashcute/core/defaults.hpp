// The default configurations: a table for each direction, in which every entry says why it was chosen.
#pragma once

#include "flashcute/core/backward_config.hpp"

namespace flashcute {

/// Whether there are blocks enough for every multiprocessor of the GPU.
enum class Grid : uint8_t { large, small };

/// A default configuration. Its head_dim and head_dim_v are the upper ends of ranges of head dimensions (a bucket); it
/// serves all of them, every type of the same size, and smaller alignments. block_n, math, optimized_softmax and
/// rescale_threshold change the bits of a result, the other options do not (docs/decisions/0003-tiles.md, also about
/// NaN and infinity); so these four are the same for large and small grids, and a row's result does not depend on the
/// batch size. All but those of Hopper's kernel need less than the 99 KB of shared memory that compute
/// capabilities 8.6, 8.9 and 12.0 allow.
struct ForwardTile {
  Grid grid;
  ForwardConfig config;
  char const* chosen_by;
};

inline constexpr ForwardTile forward_tiles[] = {
    {Grid::large,
     {.head_dim = 64, .stages = 2, .q_in_registers = true},
     "times on an H200: docs/kernels/sm80_forward.md"},
    {Grid::small, {.head_dim = 64, .block_m = 64, .blocks_per_sm = 3}, "twice the blocks; not yet measured on a GPU"},
    {Grid::large, {.head_dim = 128, .stages = 2}, "times on an H200: docs/kernels/sm80_forward.md"},
    {Grid::small,
     {.head_dim = 128, .block_m = 32, .num_warps = 2, .blocks_per_sm = 4},
     "four times the blocks; not yet measured on a GPU"},
    {Grid::large,
     {.head_dim = 256, .block_m = 64, .rescale_threshold = 0},
     "times on an H200: docs/kernels/sm80_forward.md"},
    {Grid::large,
     {.head_dim = 64,
      .block_m = 192,
      .num_warps = 12,
      .kernel = Kernel::sm90,
      .stages = 4,
      .pingpong = false,
      .scores_ahead = true},
     "times on an H200: docs/kernels/sm90_forward.md"},
    {Grid::large,
     {.head_dim = 96, .block_n = 128, .num_warps = 8, .kernel = Kernel::sm90, .stages = 4},
     "times on an H200: docs/kernels/sm90_forward.md"},
    {Grid::large,
     {.head_dim = 128, .block_n = 128, .num_warps = 8, .kernel = Kernel::sm90, .stages = 3},
     "times on an H200: docs/kernels/sm90_forward.md"},
    {Grid::large,
     {.head_dim = 192, .head_dim_v = 128, .block_n = 128, .num_warps = 8, .kernel = Kernel::sm90, .stages = 2},
     "times on an H200: docs/kernels/sm90_forward.md"},
    {Grid::large,
     {.head_dim = 160, .block_n = 128, .num_warps = 8, .kernel = Kernel::sm90, .stages = 2},
     "times on an H200: docs/kernels/sm90_forward.md"},
    {Grid::large,
     {.head_dim = 192, .block_n = 96, .num_warps = 8, .kernel = Kernel::sm90, .stages = 2},
     "times on an H200: docs/kernels/sm90_forward.md"},
    {Grid::large,
     {.head_dim = 256, .num_warps = 8, .kernel = Kernel::sm90, .stages = 2, .pingpong = false},
     "times on an H200: docs/kernels/sm90_forward.md"},
    {Grid::large,
     {.dtype = DType::float32, .head_dim = 64, .block_n = 32, .math = Math::tf32x3},
     "times on an H200: docs/kernels/sm80_forward.md"},
    {Grid::large,
     {.dtype = DType::float32, .head_dim = 128, .block_m = 64, .block_n = 32, .math = Math::tf32x3},
     "times on an H200: docs/kernels/sm80_forward.md"},
    {Grid::large,
     {.dtype = DType::float32, .head_dim = 256, .block_m = 64, .block_n = 16, .math = Math::tf32x3},
     "shared memory: two blocks an SM; times on an H200: docs/kernels/sm80_forward.md"},
    {Grid::large, {.dtype = DType::float32, .head_dim = 64, .block_n = 32}, "registers; not yet measured on a GPU"},
    {Grid::large,
     {.dtype = DType::float32, .head_dim = 128, .block_m = 64, .block_n = 32},
     "registers; not yet measured on a GPU"},
    {Grid::large,
     {.dtype = DType::float32, .head_dim = 256, .block_m = 64, .block_n = 16},
     "shared memory; not yet measured on a GPU"},
};

/// What a default configuration depends on.
struct ForwardTensors {
  DType dtype;
  int32_t head_dim, head_dim_v;
  int32_t alignment = 16;   // in bytes, of addresses, strides and rows: 16, 8, 4 or 2
  bool allow_tf32 = false;  // float32 in one product of TF32, not three
  int64_t heads = 0;        // of all batches; 0: very many
  int32_t seqlen_q = 0;
  bool bulk_copies = true;  // TMA can follow the strides
  bool allow_sm90 = true;   // Hopper's kernel may be chosen
  bool any_width = true;    // and its tiles for head dimensions that are no power of two, or not those of V
};

/// Which kernel. Tensors whose rows are not multiples of 16 bytes, or whose strides TMA cannot follow, take the sm80
/// kernel on a Hopper GPU too.
constexpr Kernel kernel_for(ForwardTensors const& t, Arch arch) {
  bool const hoppers = arch == 90 && size_of(t.dtype) == 2 && t.alignment == 16 && t.bulk_copies && t.allow_sm90;
  return hoppers ? Kernel::sm90 : Kernel::sm80;
}

/// Which units multiply, and how.
constexpr Math math_for(ForwardTensors const& t) {
  return size_of(t.dtype) == 2 || t.allow_tf32 ? Math::tensor_core : Math::tf32x3;
}

constexpr bool same_head_dims(ForwardConfig const& a, ForwardConfig const& b) {
  return a.head_dim == b.head_dim && a.head_dim_v == b.head_dim_v;
}

/// The entry of a kernel for tensors with head dimensions of at most 256. Not every bucket has one for small grids.
constexpr ForwardTile const& forward_tile(ForwardTensors const& t, Kernel kernel, Grid grid) {
  ForwardTile const* chosen = nullptr;
  for (auto const& tile : forward_tiles) {
    ForwardConfig const& c = tile.config;
    if (size_of(c.dtype) != size_of(t.dtype) || c.kernel != kernel || c.math != math_for(t)) continue;
    if (c.head_dim < t.head_dim || c.head_dim_v < t.head_dim_v) continue;
    if (!t.any_width && (c.head_dim != c.head_dim_v || (c.head_dim & (c.head_dim - 1)) != 0)) continue;
    if (chosen != nullptr && !same_head_dims(chosen->config, c)) break;  // the buckets are in order
    if (tile.grid == Grid::large || tile.grid == grid) chosen = &tile;
  }
  return chosen != nullptr ? *chosen : forward_tiles[0];  // of types without a kernel: `check` will refuse it
}

constexpr Grid grid_of(ForwardTensors const& t, ForwardTile const& tile, int32_t multiprocessors) {
  bool const small = t.heads > 0 && t.heads * ceil_div(t.seqlen_q, tile.config.block_m) < multiprocessors;
  return small ? Grid::small : Grid::large;
}

/// `multiprocessors` of the GPU; with 0 the grid counts as large.
constexpr ForwardConfig default_forward_config(ForwardTensors const& t, Arch arch, int32_t multiprocessors = 0) {
  if (arch == cpu_arch) {
    return {.dtype = t.dtype, .head_dim = t.head_dim, .head_dim_v = t.head_dim_v, .block_m = 64, .block_n = 128};
  }
  Kernel const kernel = kernel_for(t, arch);
  auto const tile_for = [&](Grid grid) -> ForwardTile const& { return forward_tile(t, kernel, grid); };
  ForwardConfig config = tile_for(grid_of(t, tile_for(Grid::large), multiprocessors)).config;
  config.dtype = t.dtype;
  if (kernel == Kernel::sm90) return config;
  config.copy_bytes = t.alignment;
  config.async_copy = t.alignment >= 4;
  // Stages are worth less than thread blocks that share a multiprocessor.
  if (config.blocks_per_sm * (smem_bytes(config) + reserved_smem_bytes) > max_smem_bytes_per_sm(arch))
    config.stages = 1;
  return config;
}

/// The default for a large grid.
constexpr ForwardConfig default_forward_config(DType dtype, int32_t d, Arch arch) {
  return default_forward_config({dtype, d, d}, arch);
}

/// The default for a small grid.
constexpr ForwardConfig small_grid_forward_config(DType dtype, int32_t d, Arch arch) {
  return default_forward_config({.dtype = dtype, .head_dim = d, .head_dim_v = d, .heads = 1, .seqlen_q = 1}, arch, 2);
}

// ---- the backward --------------------------------------------------------------------------------

/// A default configuration of the backward on a GPU, as ForwardTile. block_m, block_n and deterministic change the bits
/// of a result.
struct BackwardTile {
  BackwardConfig config;
  char const* chosen_by;
  bool causal_only = false;
};

/// Hopper's tile for head dimensions up to 128. With 128 shared memory has room for two places of K and two of Q, or
/// for one and three.
constexpr BackwardConfig narrow_sm90_tile(int32_t head_dim, int32_t stages, int32_t k_stages, bool deterministic) {
  return {.head_dim = head_dim,
          .block_m = head_dim == 64 ? 128 : 64,
          .block_n = 128,
          .num_warps = 8,
          .kernel = Kernel::sm90,
          .stages = stages,
          .k_stages = k_stages,
          .early_reads = head_dim == 128,
          .deterministic = deterministic};
}

inline constexpr BackwardTile backward_tiles[] = {
    {narrow_sm90_tile(64, 3, 2, false), "times on an H200: docs/kernels/sm90_backward.md"},
    {narrow_sm90_tile(128, 2, 2, false), "times on an H200: docs/kernels/sm90_backward.md", true},
    {narrow_sm90_tile(128, 3, 1, false), "times on an H200: docs/kernels/sm90_backward.md"},
    {narrow_sm90_tile(64, 3, 1, true), "times on an H200: docs/kernels/sm90_backward.md"},
    {narrow_sm90_tile(128, 3, 1, true), "times on an H200: docs/kernels/sm90_backward.md"},
    {{.head_dim = 192,
      .head_dim_v = 128,
      .block_m = 128,
      .num_warps = 8,
      .kernel = Kernel::sm90,
      .stages = 3,
      .dout_stages = 3,
      .deterministic = true},
     "shared memory; not yet measured on a GPU"},
    {{.head_dim = 192, .block_m = 128, .num_warps = 8, .kernel = Kernel::sm90, .stages = 3, .deterministic = true},
     "times on an H200: docs/kernels/sm90_backward.md"},
    {{.head_dim = 256, .block_m = 128, .num_warps = 8, .kernel = Kernel::sm90, .deterministic = true},
     "times on an H200: docs/kernels/sm90_backward.md"},
    {{.head_dim = 64, .block_n = 128}, "times on an H200: docs/kernels/sm80_backward.md"},
    {{.head_dim = 128, .column_warps = 2, .k_tiles_per_load = 1}, "times on an H200: docs/kernels/sm80_backward.md"},
    {{.head_dim = 256, .num_warps = 8, .column_warps = 4, .blocks_per_sm = 1, .k_tiles_per_load = 1},
     "times on an H200: docs/kernels/sm80_backward.md"},
    {{.head_dim = 256, .block_m = 32, .block_n = 32, .column_warps = 2, .blocks_per_sm = 1},
     "99 KB of shared memory; not yet measured on a GPU"},
    {{.head_dim = 64, .deterministic = true}, "times on an H200: docs/kernels/sm80_backward.md"},
    {{.head_dim = 128, .column_warps = 2, .deterministic = true}, "times on an H200: docs/kernels/sm80_backward.md"},
    {{.head_dim = 256, .num_warps = 8, .column_warps = 4, .blocks_per_sm = 1, .deterministic = true},
     "registers; not yet measured on a GPU"},
    {{.head_dim = 256, .block_m = 32, .block_n = 32, .column_warps = 2, .blocks_per_sm = 1, .deterministic = true},
     "99 KB of shared memory; not yet measured on a GPU"},
    {{.dtype = DType::float32, .head_dim = 64, .column_warps = 2, .math = Math::tf32x3},
     "times on an H200: docs/kernels/sm80_backward.md"},
    {{.dtype = DType::float32, .head_dim = 128, .block_m = 32, .block_n = 32, .column_warps = 2, .math = Math::tf32x3},
     "times on an H200: docs/kernels/sm80_backward.md"},
    {{.dtype = DType::float32,
      .head_dim = 256,
      .block_m = 32,
      .num_warps = 8,
      .column_warps = 2,
      .blocks_per_sm = 1,
      .math = Math::tf32x3},
     "times on an H200: docs/kernels/sm80_backward.md"},
    {{.dtype = DType::float32,
      .head_dim = 256,
      .block_m = 32,
      .block_n = 32,
      .column_warps = 2,
      .blocks_per_sm = 1,
      .math = Math::tf32x3},
     "163 KB of shared memory; not yet measured on a GPU"},
    {{.dtype = DType::float32, .head_dim = 64, .column_warps = 2, .math = Math::tf32x3, .deterministic = true},
     "registers; not yet measured on a GPU"},
    {{.dtype = DType::float32,
      .head_dim = 128,
      .block_m = 32,
      .block_n = 32,
      .column_warps = 2,
      .math = Math::tf32x3,
      .deterministic = true},
     "registers; not yet measured on a GPU"},
    {{.dtype = DType::float32,
      .head_dim = 256,
      .block_m = 32,
      .block_n = 32,
      .column_warps = 2,
      .blocks_per_sm = 1,
      .math = Math::tf32x3,
      .deterministic = true},
     "shared memory; not yet measured on a GPU"},
};

/// What a default configuration depends on.
struct BackwardTensors {
  DType dtype;
  int32_t head_dim, head_dim_v;
  int32_t alignment = 16;  // in bytes, of addresses, strides and rows: 16, 8, 4 or 2
  bool deterministic = false;
  MaskKind mask = MaskKind::full;
  // Hopper's kernels may be chosen: TMA can follow the strides, and they serve the mask.
  bool allow_sm90 = false;
  bool any_width = true;  // so may their tiles for head dimensions that are no power of two
};

/// Whether Hopper's kernels may compute the gradients. (Whether they have a tile is another question.)
constexpr bool sm90_serves(BackwardTensors const& t, Arch arch) {
  return t.allow_sm90 && arch == 90 && size_of(t.dtype) == 2 && t.alignment == 16;
}

/// Whether an entry may serve the tensors.
constexpr bool may_serve(BackwardTile const& tile, BackwardTensors const& t, Arch arch) {
  BackwardConfig const& c = tile.config;
  if (tile.causal_only && t.mask != MaskKind::causal) return false;
  if (size_of(c.dtype) != size_of(t.dtype) || c.head_dim < t.head_dim || c.head_dim_v < t.head_dim_v) return false;
  if (c.kernel == Kernel::sm80) return c.deterministic == t.deterministic;
  // Narrow heads in a wide tile would take longer than in the sm80 kernels' own. Wide ones are always deterministic.
  bool const wide = max_of(t.head_dim, t.head_dim_v) > 128;
  if (!t.any_width && (c.head_dim & (c.head_dim - 1)) != 0) return false;
  return sm90_serves(t, arch) && splits_dq(c) == wide && (wide || c.deterministic == t.deterministic);
}

/// How many thread blocks fit the shared memory of a multiprocessor, at most blocks_per_sm.
constexpr int64_t blocks_that_fit(BackwardConfig const& c, Arch arch) {
  int64_t blocks = c.kernel == Kernel::sm90 ? 1 : c.blocks_per_sm;
  for (BackwardPass const pass : passes_of(c)) {
    int64_t const bytes = smem_bytes(kernel_of(c, pass, {})) + reserved_smem_bytes;
    blocks = min_of<int64_t>(blocks, max_smem_bytes_per_sm(arch) / bytes);
  }
  return blocks;
}

/// Falls back to one stage where two let fewer thread blocks share a multiprocessor.
constexpr BackwardConfig with_stages_that_fit(BackwardConfig const& c, Arch arch) {
  if (c.kernel == Kernel::sm90) return c;
  BackwardConfig one_stage = c;
  one_stage.stages = 1;
  return blocks_that_fit(one_stage, arch) > blocks_that_fit(c, arch) ? one_stage : c;
}

/// The entry that serves the tensors and fits the GPU; if none fits, the last that serves them, which `check` will
/// refuse.
constexpr BackwardConfig default_backward_config(BackwardTensors const& t, Arch arch) {
  BackwardConfig config = cpu_backward_config(t.dtype, t.head_dim, t.head_dim_v);
  config.deterministic = t.deterministic;
  if (arch == cpu_arch) return config;
  for (auto const& tile : backward_tiles) {  // the buckets are in order
    BackwardConfig const& c = tile.config;
    if (!may_serve(tile, t, arch)) continue;
    config = with_stages_that_fit(c, arch);
    config.dtype = t.dtype;
    if (c.kernel == Kernel::sm90) break;
    config.copy_bytes = t.alignment;
    config.async_copy = t.alignment >= 4;
    if (blocks_that_fit(config, arch) > 0) break;
  }
  return config;
}

}  // namespace flashcute
