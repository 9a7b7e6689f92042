// Tensor maps for the emulated copy engine.
#pragma once

#include "flashcute/sm90/instructions.hpp"
#include "kernel/kernel_problem.hpp"

namespace flashcute {

/// `tile_columns`, `box_rows`: of a tile in shared memory, and of a box.
inline sm90::EmulatedMap map_of(Tensor& t, int rows, int heads, int batch, int columns, int tile_columns,
                                int box_rows) {
  return {reinterpret_cast<char const*>(t.data()),
          columns,
          rows,
          heads,
          batch,
          box_rows,
          page_bytes(2 * tile_columns),
          2 * t.stride().row,
          2 * t.stride().head,
          2 * t.stride().batch};
}

inline TensorMap opaque(sm90::EmulatedMap const& map) {
  TensorMap result{};
  std::memcpy(&result, &map, sizeof(map));
  return result;
}

}  // namespace flashcute
