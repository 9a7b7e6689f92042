// The rows of one head of a tensor in global memory.
#pragma once

#include "flashcute/core/forward_params.hpp"
#include "flashcute/device/instructions.hpp"

namespace flashcute {

/// Rows of one head of a tensor.
template <class Element>
struct Rows {
  Element const* first;
  int64_t stride;

  /// From row `first` on.
  FLASHCUTE_DEVICE static Rows of(void const* base, Strides const& stride, int batch, int head, int first) {
    return {static_cast<Element const*>(base) + row_offset(stride, batch, head, first), stride.row};
  }

  FLASHCUTE_DEVICE Element at(int row, int column) const { return global_load<Element>(first + row * stride + column); }
};

}  // namespace flashcute
