// Whether strided tensors share memory: an output must neither overlap itself nor an input.
#pragma once

#include <optional>

#include "flashcute/api.hpp"

namespace flashcute {

/// A dimension along which elements of the tensor may share an address, if there is one.
std::optional<std::size_t> overlapping_dimension(TensorView const& t);

/// Whether two tensors of one dtype share an element. Exact for tensors of equal strides, such as the parts of a packed
/// QKV, which interleave without overlap; other tensors are assumed to share one if their memory ranges intersect.
/// Neither tensor may overlap itself.
bool may_share_an_element(TensorView const& a, TensorView const& b);

}  // namespace flashcute
