// The reasons of `explain`, in sentences: why a call runs this backend and configuration.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "flashcute/api.hpp"
#include "flashcute/core/defaults.hpp"
#include "plan/call.hpp"

namespace flashcute {

/// Why `chosen` runs a call of these tensors on `device`, of architecture `arch`. `given`: the caller chose it.
std::vector<std::string> reasons_for(ForwardConfig const& chosen, bool given, ForwardTensors const& tensors,
                                     Device device, Arch arch);

/// Why `chosen`, the default configuration of the backward, computes the gradients of a call.
std::vector<std::string> reasons_for(BackwardConfig const& chosen, Call const& call);

/// "the tensors are on cuda:0"
std::string where_tensors_are(Device device);

/// Why a call does not run `other`, in words without the values of this configuration, so that several can share them:
/// the first rule that it breaks, or the exception with which `plan()` refuses the tensors; otherwise what `plan()`
/// returns.
template <class Config, class Plan>
std::string why_not(Config const& other, Call const& call, Plan const& plan) {
  try {
    if (other.dtype == call.dtype) {
      if (auto const broken = check(other, call.arch); broken != decltype(broken){}) return sentence(broken);
    }
    return plan();
  } catch (ConfigError const& error) {
    std::string_view const message = error.what();
    constexpr std::string_view argument = "cfg: ";  // the user passed none
    return std::string(message.substr(message.starts_with(argument) ? argument.size() : 0));
  } catch (Error const& error) {
    return error.what();
  }
}

}  // namespace flashcute
