// plan.hpp for the backward.
#pragma once

#include "flashcute/api.hpp"
#include "flashcute/backward_params.hpp"

namespace flashcute {

struct BackwardPlan {
  BackwardConfig config;
  Features features;
  BackwardParams params;  // without the workspace on the CPU
  Device device;
};

/// Checks all tensors of `backward` against each other, the configuration and the backend. Throws ArgumentError,
/// ConfigError, UnsupportedError or DeviceError.
BackwardPlan plan_backward(BackwardConfig const& config, TensorView const& dout, TensorView const& q,
                           TensorView const& k, TensorView const& v, TensorView const& out, TensorView const& lse,
                           TensorView const* dlse, TensorView const& dq, TensorView const& dk, TensorView const& dv,
                           BackwardOptions const& options);

}  // namespace flashcute
