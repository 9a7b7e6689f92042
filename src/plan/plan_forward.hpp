// From a checked call to a launch, or to the exception that says why not.
#pragma once

#include "flashcute/api.hpp"
#include "flashcute/core/defaults.hpp"
#include "flashcute/core/forward_params.hpp"
#include "plan/call.hpp"

namespace flashcute {

/// What a forward call writes; null: not asked for, or not there yet.
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

/// What the default configuration of a call depends on. `misaligned`, if given, becomes the reason why fewer
/// than 16 bytes can be copied at once, if so.
ForwardTensors forward_tensors(Call const& call, TensorView const* out, std::string* misaligned = nullptr);

/// What a call computes, as far as it changes the code.
Features features_of(Call const& call, bool count_blocks = false);

}  // namespace flashcute
