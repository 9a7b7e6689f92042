// The configuration of a call that brings none: the fastest of those that an image can be had of.
#pragma once

#include <string>
#include <vector>

#include "flashcute/api.hpp"
#include "flashcute/tiles.hpp"

namespace flashcute {

/// A faster configuration than the chosen one, and why there is no image of its kernel.
struct GivenUp {
  ForwardConfig config;
  std::string why;
};

/// For tensors on the CPU, or on a GPU. If no configuration that serves the call has an image, it is the default one,
/// whose launch says what is missing. `given_up`, if not null, becomes what would be faster, the fastest first.
ForwardConfig choose_config(ForwardTensors tensors, Features const& features, Device device,
                            std::vector<GivenUp>* given_up = nullptr);

}  // namespace flashcute
