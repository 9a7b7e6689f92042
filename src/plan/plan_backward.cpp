#include "plan/plan_backward.hpp"

#include <algorithm>
#include <cstdint>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

#include "flashcute/core/defaults.hpp"
#include "flashcute/policy/query_tile.hpp"
#include "image/image_store.hpp"
#include "launch/launch.hpp"
#include "plan/checks.hpp"
#include "plan/plan_forward.hpp"
#include "plan/text.hpp"
#include "system/environment.hpp"

namespace flashcute {
namespace {

/// Checks a gradient: writable, shaped like its input, without overlap in itself.
Operand checked_gradient(char const* name, TensorView const& gradient, Operand const& input,
                         CallOptions const& options) {
  require_writable(name, gradient);
  Operand const checked = operand(name, gradient, options);
  if (gradient.shape != input.view->shape) {
    throw ArgumentError(name, "shape " + shape_text(*input.view) + " as " + input.name, shape_text(gradient));
  }
  require_no_overlap(name, gradient);
  return checked;
}

/// The default configuration; chooses for every call that gives none, and so determines the size of its workspace.
/// Throws UnsupportedError if there is none.
BackwardConfig default_config_of(BackwardTensors const& t, Arch arch, std::string const& whose) {
  BackwardConfig const config = default_backward_config(t, arch);
  if (arch != cpu_arch && blocks_that_fit(config, arch) == 0) {
    throw UnsupportedError(whose + "the gradients of dtype " + name_of(t.dtype) + " with head_dim " +
                           std::to_string(max_of(t.head_dim, t.head_dim_v)) +
                           " need more shared memory than this GPU has. Use float16 or bfloat16, or train with "
                           "torch.nn.functional.scaled_dot_product_attention");
  }
  check_config(config, arch);
  return config;
}

/// Whether the launches of a configuration find their images, at least in `source`.
bool has_images(BackwardConfig const& config, Call const& call, ImageSource source) {
  for (BackwardKernelId const& kernel : kernels_of(config, features_of(call), call.options.sink != nullptr)) {
    if (image_source(kernel, call.arch) < source) return false;
  }
  return true;
}

/// The size of the workspace of a call on a GPU. Throws UnsupportedError if a launch cannot have all tiles of query
/// rows.
BackwardWorkspace checked_workspace_of(BackwardConfig const& config, Named const& q, CallOptions const& options) {
  bool const packed = is_packed(options);
  int64_t const blocks = packed
                             ? Packing::slots(static_cast<int32_t>(q.row), sequences_of(options, q.row), config.block_m)
                             : ceil_div<int64_t>(q.row, config.block_m);
  require_grid(q.all_heads() * blocks, packed ? "q: heads * (total_q / block_m + sequences + 2)"
                                              : "q: batch * heads * ceil(seqlen_q / block_m)");
  return workspace_of(config, q.all_heads(), q.row, blocks);
}

/// Checks the workspace of a call on a GPU and returns its address; null if none is needed.
float* checked_workspace(TensorView const* workspace, int64_t elements, Device device,
                         std::span<Argument const> others) {
  if (elements == 0) return nullptr;
  auto const refuse = [&](std::string const& got) {
    throw ArgumentError("workspace", "a contiguous float32 tensor of " + std::to_string(elements) + " or more elements",
                        got, "backward_workspace_size says how many");
  };
  if (workspace == nullptr) refuse("none");
  TensorView const& t = *workspace;
  if (t.dtype != DType::float32) throw ArgumentError("workspace", "dtype float32", name_of(t.dtype));
  if (t.device != device) {
    throw ArgumentError("workspace", "device " + to_string(device) + " as in q", to_string(t.device));
  }
  int64_t size = 1;
  bool contiguous = t.rank >= 0 && t.rank <= 4;
  for (int i = contiguous ? t.rank : 0; i-- > 0;) {
    contiguous = contiguous && (t.shape[i] == 1 || t.strides[i] == size);
    contiguous = contiguous && !__builtin_mul_overflow(size, t.shape[i], &size);
  }
  if (!contiguous || size < elements) {
    refuse("shape " + shape_text(t) + (contiguous ? "" : " with strides that leave gaps"));
  }
  require_writable("workspace", t);
  if (auto const past = reinterpret_cast<std::uintptr_t>(t.data) % 16; t.data == nullptr || past != 0) {
    throw ArgumentError("workspace", "an address that is a multiple of 16 bytes",
                        t.data == nullptr ? "none" : "one " + std::to_string(past) + " bytes past it");
  }
  TensorView flat = t;
  flat.rank = 1;
  flat.shape = {size};
  flat.strides = {1};
  for (auto const& [name, other] : others) require_separate("workspace", flat, name, *other);
  return static_cast<float*>(t.data);
}

}  // namespace

void check_config(BackwardConfig const& config, Arch arch) {
  BackwardConfigError const error = check(config, arch);
  if (error == BackwardConfigError::none) return;
  std::string details;
  if (error == BackwardConfigError::smem) {
    details = std::to_string(most_smem_bytes(config)) + " of " + std::to_string(max_smem_bytes(arch)) + " bytes";
  }
  if (error == BackwardConfigError::shares) {
    details = std::to_string(config.column_warps) + " of " + std::to_string(config.num_warps) + " warps share columns";
  }
  if (error == BackwardConfigError::copy_rows) {
    TileConfig const tile = tile_of(config, BackwardPass::keys);
    details = std::to_string(max_of(CopyShape::of(tile, config.head_dim).rows_per_pass,
                                    CopyShape::of(tile, config.head_dim_v).rows_per_pass)) +
              " rows";
  }
  throw_config_error(sentence(error), options_text(config, arch != cpu_arch, sentence(error)), details, arch);
}

BackwardConfig default_backward_config(DType dtype, int64_t head_dim, Arch arch, std::optional<int64_t> head_dim_v,
                                       bool deterministic, bool causal) {
  int64_t const d_v = head_dim_v.value_or(head_dim);
  require_head_dim("head_dim", head_dim);
  require_head_dim("head_dim_v", d_v);
  require_kernel(dtype, arch, "");
  return default_config_of({.dtype = dtype,
                            .head_dim = static_cast<int32_t>(head_dim),
                            .head_dim_v = static_cast<int32_t>(d_v),
                            .deterministic = deterministic,
                            .mask = causal ? MaskKind::causal : MaskKind::full,
                            .allow_sm90 = true},
                           arch, "");
}

std::string sm90_backward_problem(Call const& call, std::span<Operand const> copied, BackwardConfig const& config) {
  if (!serves(config, call.mask())) return gradients_of_sm90;
  std::string problem = bulk_copy_problem(copied);
  if (problem.empty()) common_alignment(copied, &problem);
  return problem;
}

BackwardConfig choose_backward_config(Call const& call, std::span<Operand const> copied, std::string* misaligned) {
  require_kernel(call);
  BackwardTensors t{.dtype = call.dtype,
                    .head_dim = call.params.head_dim,
                    .head_dim_v = call.params.head_dim_v,
                    .alignment = call.on_gpu() ? common_alignment(copied, misaligned) : 16,
                    .deterministic = call.options.deterministic,
                    .mask = call.mask(),
                    .allow_sm90 = call.arch == 90};
  if (t.allow_sm90) {
    t.allow_sm90 = sm90_backward_problem(call, copied, default_backward_config(t, call.arch)).empty();
  }
  if (!t.allow_sm90) return default_config_of(t, call.arch, "q: ");
  std::vector<BackwardConfig> candidates;  // the fastest first
  auto const add = [&] {
    BackwardConfig const config = default_config_of(t, call.arch, "q: ");
    if (candidates.empty() || config != candidates.back()) candidates.push_back(config);
  };
  add();
  t.mask = MaskKind::full;  // that default serves every mask
  add();
  t.any_width = false;
  add();
  t.allow_sm90 = false;
  add();
  BackwardConfig const& fastest = candidates.front();
  if (candidates.size() == 1) return fastest;
  // As the forward (choose.hpp): a first call does not wait for a compiler, if other kernels are there.
  auto const first_from = [&](ImageSource source) {
    return std::find_if(candidates.begin(), candidates.end(),
                        [&](BackwardConfig const& config) { return has_images(config, call, source); });
  };
  if (has_images(fastest, call, ImageSource::disk_cache)) return fastest;
  auto chosen = jit_mode() == JitMode::on ? first_from(ImageSource::disk_cache) : candidates.end();
  if (chosen == candidates.end()) chosen = first_from(ImageSource::compiler);
  return chosen == candidates.end() ? fastest : *chosen;
}

BackwardWorkspace checked_workspace_of(BackwardConfig const& config, Call const& call) {
  BackwardWorkspace const workspace = checked_workspace_of(config, call.q.dims, call.options);
  require_grid(count_key_tiles(call.params, config.block_n), is_packed(call.options)
                                                                 ? "k: kv_heads * (total_k / block_n + sequences + 2)"
                                                                 : "k: batch * kv_heads * ceil(seqlen_k / block_n)");
  return workspace;
}

BackwardConfig backward_config_for(TensorView const& q, TensorView const& k, TensorView const& v,
                                   std::initializer_list<Argument> others, CallOptions const& options) {
  Call const call = checked_call(q, k, v, options);
  std::vector<Operand> copied{call.q, call.k, call.v};
  for (auto const& [name, tensor] : others) {
    require_same_type(name, *tensor, q);
    copied.push_back(operand(name, *tensor, options));
  }
  return choose_backward_config(call, copied);
}

int64_t backward_workspace_size(std::optional<BackwardConfig> const& config, TensorView const& q, TensorView const& v,
                                CallOptions const& options) {
  DType const dtype = require_float("q", q);
  require_same_type("v", v, q);
  Arch const arch = arch_of(q.device);
  require_kernel(dtype, arch, "q: ");
  Named const nq = operand("q", q, options).dims, nv = operand("v", v, options).dims;
  require_head_dim("q", nq.d);
  require_head_dim("v", nv.d);
  if (arch == cpu_arch) return 0;
  if (config) check_config(*config, arch);
  if (config) return checked_workspace_of(*config, nq, options).total();
  // The alignment and strides of k and of the gradients are not known here. They decide whether Hopper's kernels run,
  // which keep more; otherwise they affect how a tile is copied, but not its size.
  BackwardTensors t{.dtype = dtype,
                    .head_dim = static_cast<int32_t>(nq.d),
                    .head_dim_v = static_cast<int32_t>(nv.d),
                    .deterministic = options.deterministic};
  int64_t most = 0;
  for (bool const allow_sm90 : {false, true}) {
    t.allow_sm90 = allow_sm90;
    BackwardConfig const possible = default_config_of(t, arch, "q: ");
    if (is_packed(options) && !serves(possible, MaskKind::band)) continue;
    most = max_of(most, checked_workspace_of(possible, nq, options).total());
  }
  return most;
}

BackwardPlan plan_backward(std::optional<BackwardConfig> const& given, Call const& call, BackwardTensorViews const& t) {
  require_kernel(call);
  if (given) require_fits(*given, call);
  TensorView const& q = *call.q.view;
  BackwardParams p{};
  p.forward = call.params;

  std::vector<Operand> copied{call.q, call.k, call.v};
  for (auto const& [name, view] : {std::pair{"out", &t.out}, std::pair{"dout", &t.dout}}) {
    require_same_type(name, *view, q);
    require_shape_of_out(name, *view, q, call.v.dims.d);
    copied.push_back(operand(name, *view, call.options));
  }
  p.forward.out = t.out.data;
  p.forward.out_stride = copied[3].dims.stride;
  p.dout = t.dout.data;
  p.dout_stride = copied[4].dims.stride;

  Named const& nq = call.q.dims;
  auto const [rows, dimensions] = lse_shape(nq, call.options);
  require_shape("lse", t.lse, lse_dtype(call.dtype), q.device, rows, dimensions, true);
  p.forward.lse = t.lse.data;
  if (t.dlse != nullptr) {
    require_shape("dlse", *t.dlse, lse_dtype(call.dtype), q.device, rows, dimensions, false);
    p.dlse = t.dlse->data;
    std::size_t const row = rows.size() - 1;
    p.dlse_stride = {.batch = is_packed(call.options) ? 0 : t.dlse->strides[0],
                     .row = t.dlse->strides[row],
                     .head = t.dlse->strides[row - 1]};
  }

  std::vector<Argument> others{{"q", &q},       {"k", call.k.view}, {"v", call.v.view},
                               {"out", &t.out}, {"lse", &t.lse},    {"dout", &t.dout}};
  if (t.dlse != nullptr) others.push_back({"dlse", t.dlse});
  for (Argument const& array : arrays_of(call.options)) others.push_back(array);
  for (auto const& [name, view, input] :
       {std::tuple{"dq", &t.dq, &call.q}, std::tuple{"dk", &t.dk, &call.k}, std::tuple{"dv", &t.dv, &call.v}}) {
    require_same_type(name, *view, q);
    copied.push_back(checked_gradient(name, *view, *input, call.options));
    for (auto const& [other_name, other] : others) require_separate(name, *view, other_name, *other);
    others.push_back({name, view});
  }
  p.dq = t.dq.data;
  p.dk = t.dk.data;
  p.dv = t.dv.data;
  p.dq_stride = copied[5].dims.stride;
  p.dk_stride = copied[6].dims.stride;
  p.dv_stride = copied[7].dims.stride;

  if (t.dsink != nullptr) {
    if (p.forward.sink.logits == nullptr) throw ArgumentError("dsink", "none without a sink", shape_text(*t.dsink));
    require_writable("dsink", *t.dsink);
    require_shape("dsink", *t.dsink, call.options.sink->dtype, q.device, {p.forward.heads}, "(heads,)", true);
    for (auto const& [other_name, other] : others) require_separate("dsink", *t.dsink, other_name, *other);
    others.push_back({"dsink", t.dsink});
    p.dsink = t.dsink->data;
  }

  BackwardConfig const config = given ? *given : choose_backward_config(call, copied);
  if (call.on_gpu()) {
    if (config.kernel == Kernel::sm80) {
      for (Operand const& tensor : copied) require_aligned(tensor, config.copy_bytes);
    } else if (given) {
      if (std::string const problem = sm90_backward_problem(call, copied, config); !problem.empty()) {
        throw ConfigError("cfg: kernel sm90 does not fit the call: " + problem +
                          ". Use kernel='sm80', or flash_attention, which chooses by itself");
      }
    }
    BackwardWorkspace const workspace = checked_workspace_of(config, call);
    float* const start = checked_workspace(t.workspace, workspace.total(), q.device, others);
    p.delta = start;
    if (workspace.dq_sums > 0) p.dq_sums = start + workspace.delta;
  }
  return {config, features_of(call), p, call.device};
}

}  // namespace flashcute
