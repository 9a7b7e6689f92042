// What `explain` says of gradients.
#pragma once

#include "flashcute/api.hpp"
#include "plan/call.hpp"

namespace flashcute {

/// How `backward` without a configuration computes the gradients of a call, as far as it is known before: dout and the
/// gradients may be less aligned than q, k, v and `out`, which may be null.
BackwardExplanation explain_backward(Call const& call, TensorView const* out);

}  // namespace flashcute
