#include "flashcute/api.hpp"

#include <algorithm>
#include <cstddef>
#include <functional>
#include <span>
#include <utility>
#include <variant>

#include "cpu/backward.hpp"
#include "cpu/forward.hpp"
#include "flashcute/sm90/rounds.hpp"
#include "image/compiler_process.hpp"
#include "image/disk_cache.hpp"
#include "image/families.hpp"
#include "image/image_store.hpp"
#include "image/jit.hpp"
#include "image/nvrtc.hpp"
#include "launch/driver.hpp"
#include "launch/launch.hpp"
#include "plan/call.hpp"
#include "plan/choose.hpp"
#include "plan/explain_backward.hpp"
#include "plan/explanation.hpp"
#include "plan/plan_backward.hpp"
#include "plan/plan_forward.hpp"
#include "system/environment.hpp"

namespace flashcute {
namespace {

template <class Config, std::size_t n>
std::vector<Config> configs_among(Family<Config> const (&families)[n]) {
  std::vector<Config> all;
  for (auto const& family : families) {
    for (Config const& config : configs_of(family)) all.push_back(config);
  }
  return all;
}

/// Adds the faster configurations that have no image yet, and how much faster they are.
void explain_given_up(std::vector<GivenUp> const& given_up, ForwardConfig const& chosen, Explanation& e) {
  bool told_of_sm90 = false;
  for (GivenUp const& g : given_up) {
    bool const sm90 = g.config.kernel == Kernel::sm90 && chosen.kernel != Kernel::sm90;
    if (sm90 && std::exchange(told_of_sm90, true)) continue;  // once for all its tiles
    e.rejected.emplace_back(sm90 ? "sm90" : name(g.config).text,
                            g.can_be_compiled ? "its kernel is not compiled yet (" + g.why + "), and another is at hand"
                                              : "there is no image of its kernel: " + g.why);
    std::string const how =
        g.can_be_compiled ? " flashcute.prebuild compiles it, once; so does the first call with FLASHCUTE_JIT=fastest"
                          : "";
    if (sm90) {
      e.notes.push_back("Hopper's kernel would be 1.5 to 2.2 times as fast (head_dim 64 to 256, 1024 keys and more)." +
                        (g.can_be_compiled
                             ? how
                             : " Its image comes with a build that has 90 in FLASHCUTE_ARCHS, or from the run-time "
                               "compiler: " +
                                   install_command()));
    } else if (g.config.kernel == Kernel::sm90) {
      e.notes.push_back("a tile of these head dimensions would be faster: " + to_string(g.config) + "." + how);
    } else if (g.config.math != chosen.math) {
      e.notes.push_back("float32 takes three products of TF32, although allow_tf32 allows one, which would be faster." +
                        how);
    } else {
      e.notes.push_back("a tile for few rows would be faster: " + to_string(g.config) + "." + how);
    }
  }
}

/// Adds a note if Hopper's kernel leaves multiprocessors idle: its table of tiles has room for one thread block on each
/// multiprocessor of the largest Hopper GPU.
void explain_idle_multiprocessors(Device device, Explanation& e) {
  int32_t const all = cuda::device_facts(device.index).multiprocessors;
  if (all <= max_multiprocessors) return;
  e.notes.push_back("Hopper's kernel runs on " + std::to_string(max_multiprocessors) +
                    " multiprocessors at most: " + std::to_string(all - max_multiprocessors) + " of the " +
                    std::to_string(all) + " of this GPU are idle");
}

/// Why a call does not run `other`. `given`: the caller chose another configuration.
std::string why_not(ForwardConfig const& other, bool given, Call const& call) {
  return why_not(other, call, [&]() -> std::string {
    plan_forward(other, call, {});
    if (given) return "another configuration was asked for";
    return call.on_gpu() ? "not the default for these shapes" : "not the default on the CPU";
  });
}

/// Adds, for each ahead-of-time configuration that was not chosen and is not in `given_up`, the reason,
/// `why(configuration)`.
template <class Why>
void explain_others(std::optional<ForwardConfig> const& chosen, std::vector<GivenUp> const& given_up, Explanation& e,
                    Why const& why) {
  for (ForwardConfig const& other : configs()) {
    bool const told = std::any_of(given_up.begin(), given_up.end(), [&](auto const& g) { return g.config == other; });
    if (chosen == other || told) continue;
    e.rejected.emplace_back(name(other).text, why(other));
  }
}

/// The configuration of a call that gives none.
ForwardConfig chosen_config(Call const& call, TensorView const* out, bool count_blocks) {
  require_kernel(call);
  return choose_config(forward_tensors(call, out), features_of(call, count_blocks), call.device);
}

CachedImage image_of(DiskCache::Entry const& entry) {
  auto [kernel, target, compiler] = parts_of_jit_key(entry.key);
  return {std::move(kernel), std::move(target), std::move(compiler), static_cast<int64_t>(entry.size),
          static_cast<double>(entry.last_used) * 1e-9};
}

std::vector<std::pair<CachedImage, std::string>> in_words(DiskCache::Outcomes const& outcomes) {
  std::vector<std::pair<CachedImage, std::string>> all;
  for (auto const& [entry, outcome] : outcomes) {
    switch (outcome) {
      case DiskCache::Outcome::whole: all.emplace_back(image_of(entry), "whole"); break;
      case DiskCache::Outcome::removed: all.emplace_back(image_of(entry), "removed"); break;
      case DiskCache::Outcome::vanished: break;  // not among the images any more
      case DiskCache::Outcome::in_use: all.emplace_back(image_of(entry), "in use"); break;
      case DiskCache::Outcome::failed: all.emplace_back(image_of(entry), "failed"); break;
    }
  }
  return all;
}

/// What is wrong with the value of an environment variable, as the calls that read it say.
std::string problem_of(std::string_view variable) {
  struct Reader {
    char const* variable;
    void (*read)();
  };
  static constexpr Reader readers[] = {
      {"FLASHCUTE_JIT", [] { jit_mode(); }},
      {"FLASHCUTE_JIT_JOBS", [] { jit_jobs(); }},
      {"FLASHCUTE_CACHE_DIR", [] { cache_folder(); }},
      {"FLASHCUTE_CACHE_SIZE", [] { cache_limit(); }},
      {"FLASHCUTE_NVRTC",
       [] {
         if (env("FLASHCUTE_NVRTC").empty()) return;  // no search only to report that it would succeed
         if (std::string const problem = nvrtc_problem(); !problem.empty()) throw ArgumentError(problem);
       }},
      {"FLASHCUTE_CUDA_INCLUDE",
       [] {
         if (!env("FLASHCUTE_CUDA_INCLUDE").empty()) cuda_include_folder();
       }},
      {"FLASHCUTE_NUM_THREADS", [] { cpu_threads(); }},
      {"FLASHCUTE_CPU_ISA", [] { cpu::isa(); }},
      {"FLASHCUTE_QUIET", [] { quiet(); }},
  };
  for (Reader const& reader : readers) {
    if (variable != reader.variable) continue;
    try {
      reader.read();
    } catch (Error const& error) {
      return error.what();
    }
  }
  return "";
}

}  // namespace

void forward(std::optional<ForwardConfig> const& config, TensorView const& q, TensorView const& k, TensorView const& v,
             TensorView const& out, TensorView const* lse, CallOptions const& options, TensorView const* block_counts) {
  Call const call = checked_call(q, k, v, options);
  ForwardOutputs const outputs{&out, lse, block_counts};
  ForwardPlan const plan =
      plan_forward(config ? *config : chosen_config(call, &out, block_counts != nullptr), call, outputs);
  if (!call.on_gpu()) {
    cpu::forward(plan.kernel.config, plan.kernel.features, plan.params);
    return;
  }
  auto const gradients = [&]() -> std::vector<BackwardKernelId> {
    try {
      Operand const copied[] = {call.q, call.k, call.v, operand("out", out, options)};
      return kernels_of(choose_backward_config(call, copied), plan.kernel.features, options.sink != nullptr);
    } catch (UnsupportedError const&) {  // no kernels: the call of `backward` will report it
      return {};
    }
  };
  std::function<std::vector<BackwardKernelId>()> needed_next;
  if (options.gradients_follow) needed_next = std::ref(gradients);  // std::ref: does not allocate
  launch(plan.kernel, plan.params, plan.device.index, options.stream, needed_next);
}

void backward(std::optional<BackwardConfig> const& config, TensorView const& dout, TensorView const& q,
              TensorView const& k, TensorView const& v, TensorView const& out, TensorView const& lse,
              TensorView const* dlse, TensorView const& dq, TensorView const& dk, TensorView const& dv,
              CallOptions const& options, TensorView const* workspace, TensorView const* dsink) {
  Call const call = checked_call(q, k, v, options);
  BackwardPlan const plan = plan_backward(config, call, {dout, out, lse, dlse, dq, dk, dv, workspace, dsink});
  if (call.on_gpu()) {
    launch(plan.config, plan.features, plan.params, plan.device.index, options.stream);
  } else {
    cpu::backward(plan.config, plan.features, plan.params);
  }
}

ForwardConfig default_config(DType dtype, int64_t head_dim, Arch arch, std::optional<int64_t> head_dim_v) {
  int64_t const d_v = head_dim_v.value_or(head_dim);
  for (auto const& [argument, d] : {std::pair{"head_dim", head_dim}, std::pair{"head_dim_v", d_v}}) {
    if (d < 1 || d > 256) throw ArgumentError(argument, "a number between 1 and 256", std::to_string(d));
  }
  require_kernel(dtype, arch, "");
  ForwardConfig const config =
      default_forward_config({dtype, static_cast<int32_t>(head_dim), static_cast<int32_t>(d_v)}, arch);
  check_config(config, arch);
  return config;
}

ForwardConfig config_for(TensorView const& q, TensorView const& k, TensorView const& v, TensorView const* out,
                         CallOptions const& options, bool count_blocks) {
  return chosen_config(checked_call(q, k, v, options), out, count_blocks);
}

std::vector<ForwardConfig> configs() { return configs_among(forward_families); }

std::vector<BackwardConfig> backward_configs() { return configs_among(backward_families); }

Explanation explain(std::optional<ForwardConfig> const& config, TensorView const& q, TensorView const& k,
                    TensorView const& v, CallOptions const& options, TensorView const* out) {
  Explanation e;
  bool const gpu = q.device.type == DeviceType::cuda;
  auto const backend_of = [&](Kernel kernel) { return gpu ? name_of(kernel) : "cpu"; };
  char const* here = backend_of(config ? config->kernel : Kernel::sm80);
  e.rejected.emplace_back(gpu ? "cpu" : "sm80", where_tensors_are(q.device));
  std::optional<ForwardConfig> chosen = config;
  std::vector<GivenUp> given_up;
  std::optional<Call> call;
  std::string problem;  // of the arguments, whatever the configuration
  try {
    call = checked_call(q, k, v, options);
    require_kernel(*call);
    std::string misaligned;
    ForwardTensors const tensors = forward_tensors(*call, out, &misaligned);
    if (!chosen) chosen = choose_config(tensors, features_of(*call), call->device, &given_up);
    here = backend_of(chosen->kernel);
    if (gpu && !config && !misaligned.empty()) {
      if (call->arch == 90 && size_of(q.dtype) == 2) e.rejected.emplace_back("sm90", misaligned);
      if (tensors.alignment < 16) e.rejected.emplace_back("copy_bytes=16", misaligned);
    }
    explain_given_up(given_up, *chosen, e);
    ForwardPlan const plan = plan_forward(*chosen, *call, {.out = out});
    e.backend = here;
    e.config = chosen;
    e.kernel = gpu ? name(plan.kernel).text : std::string(cpu::isa());
    if (chosen->kernel == Kernel::sm90) explain_idle_multiprocessors(q.device, e);
    e.image = gpu ? image_origin(plan.kernel, call->arch) : "compiled into the library";
    e.reasons = reasons_for(*chosen, config.has_value(), tensors, q.device, call->arch);
  } catch (Error const& error) {
    problem = error.what();
    e.rejected.emplace_back(here, problem);
  }
  explain_others(chosen, given_up, e, [&](ForwardConfig const& other) {
    return call ? why_not(other, config.has_value(), *call) : problem;
  });
  if (call && options.gradients_follow) e.gradients = explain_backward(*call, out);
  return e;
}

std::vector<std::pair<std::string, std::string>> prebuild(std::span<ForwardConfig const> forward,
                                                          std::span<BackwardConfig const> backward, Arch arch,
                                                          std::span<Features const> features) {
  if (arch == cpu_arch) throw ArgumentError("arch", "a GPU's compute capability such as sm_80", "the CPU");
  if (features.empty()) features = full_and_causal;
  std::vector<AnyKernelId> kernels;
  auto const add = [&](auto const& configs) {
    for (auto const& config : configs) {
      check_config(config, arch);
      for (auto const& kernel : kernels_of(config, features)) kernels.emplace_back(kernel);
    }
  };
  add(forward);
  add(backward);
  if (kernels.empty() && !backward.empty()) {
    throw ConfigError("cfgs: " + to_string(backward.front()) + ": " + gradients_of_sm90);
  }
  std::vector<Image> const images = find_images(kernels, arch);
  std::vector<std::pair<std::string, std::string>> done;
  for (std::size_t i = 0; i < kernels.size(); ++i) {
    std::string const kernel = std::visit([](auto const& id) { return std::string(name(id).text); }, kernels[i]);
    done.emplace_back(kernel, images[i].origin);
  }
  return done;
}

DriverInfo driver_info() {
  DriverInfo info;
  try {
    cuda::Driver const& d = cuda::driver();
    info.available = true;
    info.cuda_version = d.version;
    for (int i = 0; i < d.devices; ++i) info.gpus.push_back({i, cuda::device_name(i), cuda::device_arch(i)});
  } catch (Error const& error) {
    info.problem = error.what();
  }
  return info;
}

std::string build_version() { return FLASHCUTE_VERSION; }

BuildInfo build_info() {
  BuildInfo info;
  info.image_archs = image_archs();
  info.image_compiler = image_compiler();
  info.jit_problem = jit_mode() == JitMode::off ? "switched off by FLASHCUTE_JIT=off" : nvrtc_problem();
  if (info.jit_problem.empty()) info.jit_compiler = "NVRTC " + nvrtc_version() + " (" + nvrtc_path() + ")";
  info.cache_folder = cache_folder();
  info.cache_limit = static_cast<int64_t>(cache_limit());
  info.cpu_isa = cpu::isa();
  info.cpu_threads = cpu::num_threads();
  return info;
}

std::vector<CachedImage> cached_images() {
  std::vector<CachedImage> images;
  for (auto const& entry : DiskCache(cache_folder()).entries()) images.push_back(image_of(entry));
  return images;
}

std::vector<std::pair<CachedImage, std::string>> check_cached_images() {
  return in_words(DiskCache(cache_folder()).check());
}

std::vector<std::pair<CachedImage, std::string>> clear_cached_images() {
  return in_words(DiskCache(cache_folder()).clear());
}

std::vector<EnvironmentVariable> environment_variables() {
  std::vector<EnvironmentVariable> all;
  for (Variable const& v : variables()) all.push_back({v.name, v.default_value, v.meaning, problem_of(v.name)});
  return all;
}

void set_search_paths(std::vector<std::string> package_roots, std::vector<std::string> device_headers,
                      std::string compiler) {
  set_search_roots(std::move(package_roots));
  set_include_folders(std::move(device_headers));
  set_compiler_program(std::move(compiler));
}

}  // namespace flashcute
