#include "plan/explanation.hpp"

#include <algorithm>
#include <utility>

#include "plan/text.hpp"

namespace flashcute {
namespace {

constexpr char const* asked_for = "cfg asks for this configuration.";

std::string where(Device device, Arch arch) {
  return "The tensors are on " + to_string(device) + ", a GPU of compute capability " + std::to_string(arch / 10) +
         "." + std::to_string(arch % 10) + ".";
}

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

template <class Config>
std::string tile_text(Config const& chosen) {
  return "Tiles of " + std::to_string(chosen.block_m) + " query rows and blocks of " + std::to_string(chosen.block_n) +
         " keys are the default for head dimensions up to " + std::to_string(chosen.head_dim);
}

/// How tensors with head dimension d are padded.
std::string padding(char const* what, int32_t d, int32_t compiled) {
  if (d >= compiled) return "";
  return std::string(" ") + what + " of " + std::to_string(d) + " is padded with zeros and computed as one of " +
         std::to_string(compiled) + ".";
}

template <class Config>
std::string copies(Config const& chosen) {
  if (chosen.copy_bytes >= 16) return "";
  return " It copies " + std::to_string(chosen.copy_bytes) + " bytes at a time, since the tensors allow no more.";
}

std::string why_this_tile(ForwardConfig const& chosen, ForwardTensors const& tensors, Arch arch) {
  std::string text = tile_text(chosen);
  if (chosen.head_dim_v != chosen.head_dim) text += ", of v up to " + std::to_string(chosen.head_dim_v) + ",";
  ForwardTensors of_a_large_grid = tensors;
  of_a_large_grid.heads = 0;
  ForwardConfig const larger = default_forward_config(of_a_large_grid, arch);
  if (larger.kernel == chosen.kernel && larger.math == chosen.math && larger.block_m > chosen.block_m) {
    text += " where tiles of " + std::to_string(larger.block_m) + " rows would leave multiprocessors without work";
  }
  text += "." + padding("A head dimension", tensors.head_dim, chosen.head_dim);
  if (tensors.head_dim_v != tensors.head_dim) {
    text += padding("A head dimension of v", tensors.head_dim_v, chosen.head_dim_v);
  }
  return text + copies(chosen);
}

std::string why_these_passes(BackwardConfig const& chosen) {
  if (chosen.kernel == Kernel::sm90) {
    return std::string(
               "Hopper's kernels multiply on tensor cores with operands in shared memory (WGMMA) and copy by TMA. ") +
           (splits_dq(chosen)
                ? "Two passes, each of which recomputes the scores, give the same bits in every run: dk and "
                  "dv of wide heads leave no registers for dq."
            : chosen.deterministic ? "Parts of dq are added in a fixed order, which gives the same bits in every run."
                                   : "dq is summed by atomic additions, so that its last bits differ from run to run.");
  }
  std::string text = "The mma.sync kernels compute gradients on every GPU of compute capability 8.0 or later.";
  if (chosen.math == Math::tf32x3) text += " They multiply float32 on tensor cores by three TF32 products for one.";
  return text + (chosen.deterministic
                     ? " Two passes, each of which recomputes the scores, give the same bits in every run."
                     : " One pass sums dq by atomic additions, so that its last bits differ from run to run.");
}

std::string why_this_tile(BackwardConfig const& chosen, Call const& call) {
  int32_t const d = max_of(call.params.head_dim, call.params.head_dim_v);
  BackwardTensors const with_room{
      .dtype = chosen.dtype, .head_dim = d, .head_dim_v = d, .deterministic = chosen.deterministic};
  std::string text = tile_text(chosen);
  if (chosen.kernel == Kernel::sm90) return text + "." + padding("A head dimension", d, chosen.head_dim);
  // Compute capability 9.0: no GPU has more shared memory.
  if (BackwardConfig const larger = default_backward_config(with_room, 90);
      larger.block_m > chosen.block_m || larger.block_n > chosen.block_n) {
    text += " where a thread block has no more than " + std::to_string(max_smem_bytes(call.arch)) +
            " bytes of shared memory";
  }
  return text + "." + padding("A head dimension", d, chosen.head_dim) + copies(chosen);
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
    (what.starts_with("fwd_") || what.starts_with("bwd_") ? group->kernels : group->others).push_back(what);
  }
  return groups;
}

// The parts that forward's and backward's explanations share.

std::string reasons_text(std::vector<std::string> const& reasons) {
  std::string text;
  char const* label = "\n  why     ";
  for (std::string const& reason : reasons) text += std::exchange(label, "\n          ") + reason;
  return text;
}

/// The kernels, if there are several, and their images: in one line if all have the same origin.
std::string kernels_text(std::vector<std::pair<std::string, std::string>> const& kernels) {
  std::string text;
  char const* label = "\n  kernels ";
  if (kernels.size() > 1) {
    for (auto const& [kernel, image] : kernels) text += std::exchange(label, "\n          ") + kernel;
  }
  auto const other = [&](auto const& pair) { return pair.second != kernels.front().second; };
  if (std::ranges::any_of(kernels, other)) {
    for (auto const& [kernel, image] : kernels) text += "\n  image   " + image + ": " + kernel;
  } else if (!kernels.empty()) {
    text += "\n  image   " + kernels.front().second;
  }
  return text;
}

std::string notes_and_rejected_text(auto const& e) {
  std::string text;
  for (std::string const& note : e.notes) text += "\n  note    " + note;
  if (!e.rejected.empty()) text += "\n  not taken";
  for (Rejected const& group : by_reason(e.rejected)) text += "\n    " + group.text();
  return text;
}

}  // namespace

std::string where_tensors_are(Device device) {
  return "the tensors are on " + (device.type == DeviceType::cuda ? to_string(device) : "the CPU");
}

std::vector<std::string> reasons_for(ForwardConfig const& chosen, bool given, ForwardTensors const& tensors,
                                     Device device, Arch arch) {
  if (device.type == DeviceType::cpu) {
    std::vector<std::string> reasons = {"The tensors are on the CPU."};
    if (given) reasons.push_back(asked_for);
    return reasons;
  }
  if (given) return {where(device, arch), asked_for};
  return {where(device, arch), why_this_kernel(chosen, tensors, arch), why_this_tile(chosen, tensors, arch)};
}

std::vector<std::string> reasons_for(BackwardConfig const& chosen, Call const& call) {
  if (!call.on_gpu()) return {"The tensors are on the CPU."};
  return {where(call.device, call.arch), why_these_passes(chosen), why_this_tile(chosen, call)};
}

std::string to_string(ForwardConfig const& config) { return "ForwardConfig(" + options_text(config) + ")"; }

std::string to_string(BackwardConfig const& config) { return "BackwardConfig(" + options_text(config) + ")"; }

std::string to_string(Explanation const& e) {
  std::string text = e.backend.empty() ? "nothing can run this call" : "backend " + e.backend + ": " + e.kernel;
  text += reasons_text(e.reasons);
  if (e.config) text += "\n  config  ForwardConfig(" + options_text(*e.config, e.backend != "cpu") + ")";
  if (!e.image.empty()) text += "\n  image   " + e.image;
  text += notes_and_rejected_text(e);
  if (e.gradients) text += "\n" + to_string(*e.gradients);
  return text;
}

std::string to_string(BackwardExplanation const& e) {
  if (e.backend.empty()) return "no kernel computes gradients of this call" + notes_and_rejected_text(e);
  bool const gpu = e.backend != "cpu";
  std::string text = "gradients by backend " + e.backend;
  if (e.kernels.size() == 1) text += ": " + e.kernels[0].first;
  text += reasons_text(e.reasons);
  if (e.config) text += "\n  config  BackwardConfig(" + options_text(*e.config, gpu) + ")";
  text += kernels_text(e.kernels);
  if (e.workspace_bytes > 0) text += "\n  memory  a workspace of " + std::to_string(e.workspace_bytes) + " bytes";
  text += std::string("\n  bits    ") + (e.same_bits ? "the same in every run" : "those of dq differ from run to run");
  return text + notes_and_rejected_text(e);
}

}  // namespace flashcute
