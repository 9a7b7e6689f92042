// Tensors as Hopper's copy engine sees them.
#pragma once

#include "flashcute/api.hpp"
#include "flashcute/sm90/params.hpp"

namespace flashcute {

/// Sets the maps of a launch of the Hopper forward, of the tensors in its other parameters. Throws DriverError, with
/// the tensor's name, if the driver refuses one.
void set_tensor_maps(ForwardConfig const& config, Sm90ForwardParams& params);

}  // namespace flashcute
