// The part of `explain` about gradients.
#pragma once

#include "flashcute/api.hpp"
#include "plan/call.hpp"

namespace flashcute {

/// How `backward` without a configuration computes the gradients of a call, as far as q, k, v and `out` (which may be
/// null) determine it: dout and the gradients may be less aligned.
BackwardExplanation explain_backward(Call const& call, TensorView const* out);

}  // namespace flashcute
