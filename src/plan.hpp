// From tensors and options to a launch, or to the exception that says why not. All input checks live here.
#pragma once

#include "flashcute/api.hpp"
#include "flashcute/params.hpp"

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

/// Throws UnsupportedError, which says what to use instead, if no configuration can serve a dtype and head
/// dimension on `arch`; DeviceError if the GPU is too old. `whose` starts the message: "q: " or "".
void require_kernel(DType dtype, int64_t head_dim, Arch arch, std::string const& whose);

}  // namespace flashcute
