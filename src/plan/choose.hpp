// The configuration of a call that brings none: the fastest of those whose image is at hand, so that a first call does
// not wait for a compiler; if there is none, the fastest of those whose image can be compiled. FLASHCUTE_JIT=fastest
// compiles the fastest of all.
#pragma once

#include <string>
#include <vector>

#include "flashcute/api.hpp"
#include "flashcute/core/defaults.hpp"

namespace flashcute {

/// A faster configuration than the chosen one.
struct GivenUp {
  ForwardConfig config;
  bool can_be_compiled;
  std::string why;  // there is no image at hand
};

/// For tensors on the CPU, or on a GPU. If no configuration that serves the call can have an image, it is the default
/// one, whose launch says what is missing. `given_up`, if not null, becomes what would be faster, the fastest first.
ForwardConfig choose_config(ForwardTensors const& tensors, Features const& features, Device device,
                            std::vector<GivenUp>* given_up = nullptr);

}  // namespace flashcute
