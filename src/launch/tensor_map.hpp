// Encodes the tensor maps through which Hopper's kernels read tensors by TMA.
#pragma once

#include "flashcute/api.hpp"
#include "flashcute/sm90/params.hpp"

namespace flashcute {

/// Sets the maps of a launch of Hopper's forward from its other parameters. Throws DriverError, with the tensor's name,
/// if the driver rejects one.
void set_tensor_maps(ForwardConfig const& config, Sm90ForwardParams& params);
/// The same of Hopper's gradients.
void set_tensor_maps(BackwardConfig const& config, Sm90BackwardParams& params);

}  // namespace flashcute
