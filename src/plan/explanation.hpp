// Why a call runs what it runs, in sentences.
#pragma once

#include <string>
#include <vector>

#include "flashcute/api.hpp"
#include "flashcute/core/defaults.hpp"

namespace flashcute {

/// Why `chosen` runs a call of these tensors on `device`, of architecture `arch`. `given`: the caller named it.
std::vector<std::string> reasons_for(ForwardConfig const& chosen, bool given, ForwardTensors const& tensors,
                                     Device device, Arch arch);

}  // namespace flashcute
