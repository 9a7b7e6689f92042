// The part of a configuration from which the sm80 kernels of both directions build their layouts, copies and products:
// how a tile is divided, kept in shared memory and multiplied.
#pragma once

#include "flashcute/core/enums.hpp"

namespace flashcute {

struct TileConfig {
  DType dtype;
  int32_t head_dim;    // of q and k
  int32_t head_dim_v;  // of v and the output
  int32_t block_m;     // rows of the tile that a thread block owns
  int32_t block_n;     // rows of each block that its loop visits
  int32_t num_warps;
  Math math;
  int32_t stages;
  int32_t copy_bytes;
  bool async_copy;
  bool swizzled;
  int32_t k_tiles_per_load;
  bool mma_double_buffer;

  constexpr bool operator==(TileConfig const&) const = default;
};

/// The tile of a configuration of either direction, with the given numbers of rows.
template <class Config>
constexpr TileConfig tile_with_rows(Config const& c, int32_t block_m, int32_t block_n) {
  return {.dtype = c.dtype,
          .head_dim = c.head_dim,
          .head_dim_v = c.head_dim_v,
          .block_m = block_m,
          .block_n = block_n,
          .num_warps = c.num_warps,
          .math = c.math,
          .stages = c.stages,
          .copy_bytes = c.copy_bytes,
          .async_copy = c.async_copy,
          .swizzled = c.swizzled,
          .k_tiles_per_load = c.k_tiles_per_load,
          .mma_double_buffer = c.mma_double_buffer};
}

constexpr int32_t num_threads(TileConfig const& c) { return 32 * c.num_warps; }

/// How a tile of `width` columns is laid out in shared memory and copied there. Its rows are cut into chunks of at most
/// 128 bytes, one word for each of the 32 banks; neighbouring threads copy neighbouring pieces of a row of a chunk.
struct CopyShape {
  int32_t chunk;            // columns of a chunk
  int32_t vector;           // columns that a thread copies at once
  int32_t threads_per_row;  // that copy one row of a chunk
  int32_t rows_per_pass;    // rows that all threads together copy at once

  static constexpr CopyShape of(TileConfig const& c, int32_t width) {
    CopyShape s{};
    int32_t const size = size_of(c.dtype);
    for (s.chunk = 128 / size; width % s.chunk != 0;) s.chunk /= 2;
    s.vector = c.copy_bytes / size;
    s.threads_per_row = min_of<int32_t>(32, s.chunk / s.vector);
    s.rows_per_pass = num_threads(c) / s.threads_per_row;
    return s;
  }
};

}  // namespace flashcute
