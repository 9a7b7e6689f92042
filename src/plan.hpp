// From tensors and options to a launch, or to the exception that says why not. All input checks live here.
#pragma once

#include "flashcute/api.hpp"
#include "flashcute/params.hpp"
#include "flashcute/tiles.hpp"

namespace flashcute {

struct ForwardPlan {
  ForwardKernelId kernel;
  ForwardParams params;
  Device device;
};

/// Checks q, k, v (and out, lse if given) against each other, the configuration and the backend. Throws
/// ArgumentError, ConfigError, UnsupportedError or DeviceError.
ForwardPlan plan_forward(ForwardConfig const& config, TensorView const& q, TensorView const& k, TensorView const& v,
                         TensorView const* out, TensorView const* lse, ForwardOptions const& options);

/// What the default configuration of a call depends on. `misaligned`, if given, becomes the reason why fewer
/// than 16 bytes can be copied at once, if so.
ForwardTensors forward_tensors(TensorView const& q, TensorView const& k, TensorView const& v, TensorView const* out,
                               ForwardOptions const& options, std::string* misaligned = nullptr);

/// What a call computes, as far as it changes the code.
Features features_of(ForwardOptions const& options);

/// Throws UnsupportedError, which says what to use instead, if no configuration can serve a dtype on `arch`;
/// DeviceError if the GPU is too old. `whose` starts the message: "q: " or "".
void require_kernel(DType dtype, Arch arch, std::string const& whose);

}  // namespace flashcute
