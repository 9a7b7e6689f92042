// From a checked call of the forward to its launch, or to the exception that says why there is none.
#pragma once

#include "flashcute/api.hpp"
#include "flashcute/core/defaults.hpp"
#include "flashcute/core/forward_params.hpp"
#include "plan/call.hpp"

namespace flashcute {

/// The outputs of a forward call; null: not requested, or not allocated yet.
struct ForwardOutputs {
  TensorView const* out = nullptr;
  TensorView const* lse = nullptr;
  TensorView const* block_counts = nullptr;
};

struct ForwardPlan {
  ForwardKernelId kernel;
  ForwardParams params;
  Device device;
};

/// Checks the outputs that are given, the configuration and the backend. Throws ArgumentError, ConfigError,
/// UnsupportedError or DeviceError.
ForwardPlan plan_forward(ForwardConfig const& config, Call const& call, ForwardOutputs const& outputs);

/// What the default configuration of a call depends on. `misaligned`, if given, receives the reason why fewer than 16
/// bytes can be copied at once, or why TMA cannot read the tensors.
ForwardTensors forward_tensors(Call const& call, TensorView const* out, std::string* misaligned = nullptr);

/// The features of a call.
Features features_of(Call const& call, bool count_blocks = false);

}  // namespace flashcute
