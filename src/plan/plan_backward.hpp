// From a checked call of the backward to its launches, as plan_forward.hpp for the forward.
#pragma once

#include <optional>
#include <span>
#include <string>

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
  TensorView const* workspace;  // ignored on the CPU
  TensorView const* dsink;      // may be null
};

/// Checks the tensors of `backward`, the configuration, or the default one, and the backend. Throws ArgumentError,
/// ConfigError, UnsupportedError or DeviceError.
BackwardPlan plan_backward(std::optional<BackwardConfig> const& config, Call const& call,
                           BackwardTensorViews const& tensors);

inline constexpr char const* gradients_of_sm90 =
    "Hopper's kernels compute gradients that are deterministic, by blocks of 80 query rows, or of head dimensions "
    "above 128, of full and causal masks only";

/// Why Hopper's kernels of a configuration do not compute the gradients of a call with these tensors; empty if they do.
std::string sm90_backward_problem(Call const& call, std::span<Operand const> copied, BackwardConfig const& config);

/// The configuration of a call that gives none. `copied`: q, k, v, and those of the other tensors that kernels copy
/// (out, dout, dq, dk and dv) that are known. `misaligned` as in common_alignment.
BackwardConfig choose_backward_config(Call const& call, std::span<Operand const> copied,
                                      std::string* misaligned = nullptr);

/// The size of the workspace of a call on a GPU. Throws UnsupportedError if a launch cannot have all its tiles.
BackwardWorkspace checked_workspace_of(BackwardConfig const& config, Call const& call);

}  // namespace flashcute
