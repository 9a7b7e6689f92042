// Tensors as Hopper's copy engine sees them.
#pragma once

#include "flashcute/api.hpp"
#include "flashcute/tensor_map.hpp"

namespace flashcute {

/// The maps that a launch of the Hopper forward adds to its parameters. Throws DriverError, with the tensor's name, if
/// the driver refuses one.
HopperForwardParams hopper_params(ForwardConfig const& config, ForwardParams const& params);

}  // namespace flashcute
