// plan.hpp for the backward.
#pragma once

#include <optional>

#include "flashcute/api.hpp"
#include "flashcute/core/backward_params.hpp"
#include "plan/call.hpp"

namespace flashcute {

struct BackwardPlan {
  BackwardConfig config;
  Features features;
  BackwardParams params;  // without the workspace on the CPU
  Device device;
};

/// The tensors of a backward call beside q, k and v.
struct BackwardTensorViews {
  TensorView const& dout;
  TensorView const& out;
  TensorView const& lse;
  TensorView const* dlse;  // may be null
  TensorView const& dq;
  TensorView const& dk;
  TensorView const& dv;
  TensorView const* workspace;  // not looked at on the CPU
};

/// Checks all tensors of `backward` against each other, the configuration, or the default one, and the backend. Throws
/// ArgumentError, ConfigError, UnsupportedError or DeviceError.
BackwardPlan plan_backward(std::optional<BackwardConfig> const& config, Call const& call,
                           BackwardTensorViews const& tensors);

/// The default configuration for tensors that are aligned to 16 bytes.
BackwardConfig aligned_backward_config(Call const& call);

}  // namespace flashcute
