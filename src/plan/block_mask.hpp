// Block masks: the checks of those that a call is given.
#pragma once

#include "flashcute/api.hpp"
#include "flashcute/core/forward_params.hpp"

namespace flashcute {

/// The options' mask for a call with the sizes in `p`. Throws ArgumentError.
BlockMapParams checked_block_mask(CallOptions const& options, Device device, ForwardParams const& p);

}  // namespace flashcute
