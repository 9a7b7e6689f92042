#include "plan/explain_backward.hpp"

#include <algorithm>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cpu/forward.hpp"
#include "flashcute/core/defaults.hpp"
#include "image/image_store.hpp"
#include "launch/launch.hpp"
#include "plan/checks.hpp"
#include "plan/explanation.hpp"
#include "plan/plan_backward.hpp"
#include "plan/plan_forward.hpp"

namespace flashcute {
namespace {

/// Why `other` is not the default configuration.
std::string why_not_default(BackwardConfig const& other, Call const& call, std::span<Operand const> copied) {
  return why_not(other, call, [&]() -> std::string {
    require_fits(other, call);
    if (!call.on_gpu()) return "not the default on the CPU";
    if (other.kernel == Kernel::sm90) {
      std::string const problem = sm90_backward_problem(call, copied, other);
      if (!problem.empty()) return problem;
    } else {
      for (Operand const* tensor : {&call.q, &call.k, &call.v}) require_aligned(*tensor, other.copy_bytes);
    }
    if (call.options.deterministic && !other.deterministic) {
      return "it does not give the same bits in every run, as the call asks";
    }
    return "not the default for these shapes and this mask";
  });
}

/// Why a configuration that serves the call is not taken for want of images.
std::string why_no_images(BackwardConfig const& config, Call const& call) {
  for (BackwardKernelId const& kernel : kernels_of(config, features_of(call), call.options.sink != nullptr)) {
    if (image_source(kernel, call.arch) == ImageSource::none) return image_problem(kernel, call.arch);
  }
  return "a first call would wait for its compilation; FLASHCUTE_JIT=fastest takes it";
}

/// The default where Hopper's kernels may be taken.
BackwardConfig default_with_sm90(Call const& call) {
  return default_backward_config({.dtype = call.dtype,
                                  .head_dim = call.params.head_dim,
                                  .head_dim_v = call.params.head_dim_v,
                                  .deterministic = call.options.deterministic,
                                  .mask = call.mask(),
                                  .allow_sm90 = true},
                                 call.arch);
}

/// Why Hopper's kernels are not taken on a Hopper GPU.
std::string why_not_sm90(Call const& call, std::span<Operand const> copied) {
  BackwardConfig const best = default_with_sm90(call);
  if (std::string const problem = sm90_backward_problem(call, copied, best); !problem.empty()) return problem;
  if (best.kernel != Kernel::sm90) return "it computes gradients of float16 and bfloat16";
  return why_no_images(best, call);
}

/// Adds what would be faster on a GPU and why it was not taken.
void explain_wishes(BackwardConfig const& chosen, Call const& call, std::span<Operand const> copied,
                    std::string const& misaligned, BackwardExplanation& e) {
  if (call.arch == 90 && chosen.kernel == Kernel::sm80) e.rejected.emplace_back("sm90", why_not_sm90(call, copied));
  if (chosen.kernel == Kernel::sm90) {
    BackwardConfig const best = default_with_sm90(call);
    if (best != chosen) {
      e.rejected.emplace_back(
          best.head_dim != chosen.head_dim ? "head_dim=" + std::to_string(best.head_dim) : std::string(name(best).text),
          why_no_images(best, call));
    }
  }
  if (chosen.copy_bytes < 16) e.rejected.emplace_back("copy_bytes=16", misaligned);
  if (chosen.deterministic && !(chosen.kernel == Kernel::sm90 && splits_dq(chosen))) {  // which has no faster form
    e.rejected.emplace_back("deterministic=False",
                            "it would be faster, but not give the same bits in every run, as the call asks");
  }
}

/// Adds the kernels of all passes, and a note if a first call waits for a compiler.
void explain_images(BackwardConfig const& chosen, Call const& call, BackwardExplanation& e) {
  std::size_t compiled = 0;
  for (BackwardKernelId const& kernel : kernels_of(chosen, features_of(call), call.options.sink != nullptr)) {
    e.kernels.emplace_back(name(kernel).text, image_origin(kernel, call.arch));
    if (image_source(kernel, call.arch) == ImageSource::compiler) ++compiled;
  }
  if (compiled == 0) return;
  e.notes.push_back("A first call compiles " + std::to_string(compiled) + " of " + std::to_string(e.kernels.size()) +
                    " kernels, at the same time, and waits for them; flashcute.prebuild compiles them beforehand.");
}

}  // namespace

BackwardExplanation explain_backward(Call const& call, TensorView const* out) {
  bool const gpu = call.on_gpu();
  char const* here = gpu ? "sm80" : "cpu";
  BackwardExplanation e;
  e.rejected.emplace_back(gpu ? "cpu" : "sm80", where_tensors_are(call.device));
  std::optional<BackwardConfig> chosen;
  std::vector<Operand> copied{call.q, call.k, call.v};
  try {
    if (out != nullptr) copied.push_back(operand("out", *out, call.options));
    std::string misaligned;
    chosen = choose_backward_config(call, copied, &misaligned);
    if (gpu) {
      e.workspace_bytes = checked_workspace_of(*chosen, call).total() * static_cast<int64_t>(sizeof(float));
      explain_wishes(*chosen, call, copied, misaligned, e);
      explain_images(*chosen, call, e);
    } else {
      e.kernels.emplace_back(cpu::isa(), "compiled into the library");
    }
    e.same_bits = !gpu || chosen->deterministic;
    e.reasons = reasons_for(*chosen, call);
    e.config = chosen;
    if (gpu) here = name_of(chosen->kernel);
    e.backend = here;
  } catch (Error const& error) {
    e.rejected.emplace_back(here, error.what());
  }
  for (BackwardConfig const& other : backward_configs()) {
    if (chosen != other) e.rejected.emplace_back(name(other).text, why_not_default(other, call, copied));
  }
  return e;
}

}  // namespace flashcute
