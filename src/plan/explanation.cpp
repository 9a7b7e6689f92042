#include "plan/explanation.hpp"

#include <algorithm>
#include <utility>

#include "plan/text.hpp"

namespace flashcute {
namespace {

constexpr char const* asked_for = "cfg asks for this configuration.";

std::string why_this_kernel(ForwardConfig const& chosen, ForwardTensors const& tensors, Arch arch) {
  if (chosen.kernel == Kernel::sm90) {
    return "Hopper's kernel (copies by TMA, products by WGMMA, specialised warps) takes float16 and bfloat16 tensors "
           "whose addresses, strides and rows are multiples of 16 bytes, as these are.";
  }
  std::string text = "The sm80 kernel (cp.async, mma.sync) runs on every GPU of compute capability 8.0 or later";
  if (arch == 90 && tensors.dtype == DType::float32) text += "; Hopper's kernel takes float16 and bfloat16 only";
  text += ".";
  if (chosen.math == Math::tf32x3) {
    text += " It multiplies float32 on tensor cores by three TF32 products for one, because one alone is less exact.";
  } else if (tensors.dtype == DType::float32) {
    text += " allow_tf32 lets it round float32 to TF32 (10 bits of fraction).";
  }
  return text;
}

std::string why_this_tile(ForwardConfig const& chosen, ForwardTensors const& tensors, Arch arch) {
  std::string const width = std::to_string(chosen.head_dim);
  std::string text = "Tiles of " + std::to_string(chosen.block_m) + " query rows and blocks of " +
                     std::to_string(chosen.block_n) + " keys are the default for head dimensions up to " + width;
  ForwardTensors of_a_large_grid = tensors;
  of_a_large_grid.heads = 0;
  ForwardConfig const larger = default_forward_config(of_a_large_grid, arch);
  if (larger.kernel == chosen.kernel && larger.math == chosen.math && larger.block_m > chosen.block_m) {
    text += " where tiles of " + std::to_string(larger.block_m) + " rows would leave multiprocessors without work";
  }
  text += ".";
  if (int32_t const d = max_of(tensors.head_dim, tensors.head_dim_v); d < chosen.head_dim) {
    text += " A head dimension of " + std::to_string(d) + " is padded with zeros and computed as one of " + width + ".";
  }
  if (chosen.copy_bytes < 16) {
    text += " It copies " + std::to_string(chosen.copy_bytes) + " bytes at a time, since the tensors allow no more.";
  }
  return text;
}

/// The alternatives that were not taken for one reason.
struct Rejected {
  std::string reason;
  std::vector<std::string> others;   // backends and the like
  std::vector<std::string> kernels;  // configurations that are compiled ahead of time, by name

  std::string text() const {
    std::string what;
    for (std::string const& other : others) what += (what.empty() ? "" : ", ") + other;
    if (kernels.empty()) return what + ": " + reason;
    what += what.empty() ? "" : ", ";
    what += kernels.size() == 1 ? kernels[0] : std::to_string(kernels.size()) + " ahead-of-time configurations";
    return what + ": " + reason;
  }
};

std::vector<Rejected> by_reason(std::vector<std::pair<std::string, std::string>> const& rejected) {
  std::vector<Rejected> groups;
  for (auto const& [what, reason] : rejected) {
    auto group = std::ranges::find(groups, reason, &Rejected::reason);
    if (group == groups.end()) group = groups.insert(group, {reason, {}, {}});
    (what.starts_with("fwd_") ? group->kernels : group->others).push_back(what);
  }
  return groups;
}

}  // namespace

std::vector<std::string> reasons_for(ForwardConfig const& chosen, bool given, ForwardTensors const& tensors,
                                     Device device, Arch arch) {
  if (device.type == DeviceType::cpu) {
    std::vector<std::string> reasons = {"The tensors are on the CPU."};
    if (given) reasons.push_back(asked_for);
    return reasons;
  }
  std::string const where = "The tensors are on " + to_string(device) + ", a GPU of compute capability " +
                            std::to_string(arch / 10) + "." + std::to_string(arch % 10) + ".";
  if (given) return {where, asked_for};
  return {where, why_this_kernel(chosen, tensors, arch), why_this_tile(chosen, tensors, arch)};
}

std::string to_string(ForwardConfig const& config) { return "ForwardConfig(" + options_text(config) + ")"; }

std::string to_string(BackwardConfig const& config) { return "BackwardConfig(" + options_text(config) + ")"; }

std::string to_string(Explanation const& e) {
  std::string text = e.backend.empty() ? "nothing can run this call" : "backend " + e.backend + ": " + e.kernel;
  char const* label = "\n  why     ";
  for (std::string const& reason : e.reasons) text += std::exchange(label, "\n          ") + reason;
  if (e.config) text += "\n  config  ForwardConfig(" + options_text(*e.config, e.backend != "cpu") + ")";
  if (!e.image.empty()) text += "\n  image   " + e.image;
  for (std::string const& note : e.notes) text += "\n  note    " + note;
  if (!e.rejected.empty()) text += "\n  not taken";
  for (Rejected const& group : by_reason(e.rejected)) text += "\n    " + group.text();
  return text;
}

}  // namespace flashcute
