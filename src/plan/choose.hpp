// Chooses the configuration of a call that gives none: the fastest of those whose image exists already, so that a first
// call does not wait for a compiler; if there is none, the fastest of those that can be compiled. With
// FLASHCUTE_JIT=fastest, the fastest that exists or can be compiled.
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
  std::string why;  // the reason why it has no image yet
};

/// For tensors on `device`, CPU or GPU. If no configuration that serves the call can have an image, returns the default
/// one, whose launch reports what is missing. `given_up`, if not null, receives the faster configurations, the fastest
/// first.
ForwardConfig choose_config(ForwardTensors const& tensors, Features const& features, Device device,
                            std::vector<GivenUp>* given_up = nullptr);

}  // namespace flashcute
