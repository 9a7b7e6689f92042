// Whether strided tensors share memory: an output must neither overlap itself nor an input.
#pragma once

#include <optional>

#include "flashcute/api.hpp"

namespace flashcute {

/// A dimension along which the tensor steps onto elements of its own, if there is one.
std::optional<std::size_t> overlapping_dimension(TensorView const& t);

/// Whether two tensors of one dtype share an element. Exact for tensors of equal strides, such as the parts of a
/// packed QKV, which interleave and share nothing; of others whose memory ranges intersect it is assumed. Neither
/// tensor overlaps itself.
bool may_share_an_element(TensorView const& a, TensorView const& b);

}  // namespace flashcute
