#include "plan_backward.hpp"

#include <cstdint>
#include <span>
#include <vector>

#include "checks.hpp"
#include "flashcute/query_tile.hpp"
#include "flashcute/tiles.hpp"
#include "plan.hpp"
#include "text.hpp"

namespace flashcute {
namespace {

/// A gradient to write: shaped like its input, in memory of its own.
Named checked_gradient(Argument const& gradient, Argument const& input, Layout layout) {
  require_writable(gradient.name, *gradient.tensor);
  Named const n = named(gradient.name, *gradient.tensor, layout);
  if (gradient.tensor->shape != input.tensor->shape) {
    throw ArgumentError(gradient.name, "shape " + shape_text(*input.tensor) + " as " + input.name,
                        shape_text(*gradient.tensor));
  }
  require_no_overlap(gradient.name, *gradient.tensor);
  return n;
}

/// The default configuration, of tensors that have a kernel.
BackwardConfig default_config_of(BackwardTensors const& t, Arch arch, std::string const& whose) {
  BackwardConfig const config = default_backward_config(t, arch);
  if (arch != cpu_arch && blocks_that_fit(config, arch) == 0) {
    throw UnsupportedError(whose + "the gradients of dtype " + name_of(t.dtype) + " with head_dim " +
                           std::to_string(max_of(t.head_dim, t.head_dim_v)) +
                           " need more shared memory than this GPU has. Use float16 or bfloat16, or train with "
                           "torch.nn.functional.scaled_dot_product_attention");
  }
  return config;
}

/// What the default configuration of a call depends on, but for alignment.
BackwardTensors checked_tensors(TensorView const& q, TensorView const& v, BackwardOptions const& options) {
  require_float("q", q);
  require_same_type("v", v, q);
  require_kernel(q.dtype, arch_of(q.device), "q: ");
  int64_t const d = named("q", q, options.layout).d, d_v = named("v", v, options.layout).d;
  require_head_dim("q", d);
  require_head_dim("v", d_v);
  return {.dtype = q.dtype,
          .head_dim = static_cast<int32_t>(d),
          .head_dim_v = static_cast<int32_t>(d_v),
          .deterministic = options.deterministic};
}

/// How large the workspace of a call on a GPU must be, whose tiles of query rows one launch can compute.
BackwardWorkspace checked_workspace_of(BackwardConfig const& config, Named const& q) {
  require_grid(q.all_heads() * ceil_div<int64_t>(q.row, config.block_m), "q: batch * heads * ceil(seqlen_q / block_m)");
  return workspace_of(config, q.all_heads(), q.row);
}

/// The workspace of a call on a GPU, in memory of its own: where it begins; null if none is needed.
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
    int64_t bytes = 0;
    for (BackwardPass const pass : passes_of(config)) {
      bytes = max_of(bytes, smem_bytes(kernel_of(config, pass, MaskKind::full)));
    }
    details = std::to_string(bytes) + " of " + std::to_string(max_smem_bytes(arch)) + " bytes";
  }
  if (error == BackwardConfigError::shares) {
    details = std::to_string(config.column_warps) + " of " + std::to_string(config.num_warps) + " warps share columns";
  }
  if (error == BackwardConfigError::copy_rows) {
    ForwardConfig const tile = tile_of(config, BackwardPass::keys);
    details = std::to_string(max_of(CopyShape::of(tile, config.head_dim).rows_per_pass,
                                    CopyShape::of(tile, config.head_dim_v).rows_per_pass)) +
              " rows";
  }
  throw_config_error(sentence(error), options_text(config, arch != cpu_arch, sentence(error)), details, arch);
}

BackwardConfig default_backward_config(DType dtype, int64_t head_dim, Arch arch, std::optional<int64_t> head_dim_v,
                                       bool deterministic) {
  int64_t const d_v = head_dim_v.value_or(head_dim);
  require_head_dim("head_dim", head_dim);
  require_head_dim("head_dim_v", d_v);
  require_kernel(dtype, arch, "");
  BackwardConfig const config = default_config_of({.dtype = dtype,
                                                   .head_dim = static_cast<int32_t>(head_dim),
                                                   .head_dim_v = static_cast<int32_t>(d_v),
                                                   .deterministic = deterministic},
                                                  arch, "");
  check_config(config, arch);
  return config;
}

BackwardConfig backward_config_for(TensorView const& q, TensorView const& k, TensorView const& v,
                                   std::initializer_list<Argument> others, BackwardOptions const& options) {
  BackwardTensors t = checked_tensors(q, v, options);
  if (q.device.type == DeviceType::cuda) {
    std::vector<Argument> arguments{{"q", &q}, {"k", &k}, {"v", &v}};
    arguments.insert(arguments.end(), others);
    for (auto const& [name, tensor] : arguments) require_same_type(name, *tensor, q);
    t.alignment = common_alignment(arguments, options.layout);
  }
  return default_config_of(t, arch_of(q.device), "q: ");
}

int64_t backward_workspace_size(std::optional<BackwardConfig> const& config, TensorView const& q, TensorView const& v,
                                BackwardOptions const& options) {
  BackwardTensors const t = checked_tensors(q, v, options);
  if (q.device.type == DeviceType::cpu) return 0;
  Arch const arch = arch_of(q.device);
  if (config) check_config(*config, arch);
  Named const n = named("q", q, options.layout);
  return checked_workspace_of(config ? *config : default_config_of(t, arch, "q: "), n).total();
}

BackwardPlan plan_backward(BackwardConfig const& config, TensorView const& dout, TensorView const& q,
                           TensorView const& k, TensorView const& v, TensorView const& out, TensorView const& lse,
                           TensorView const* dlse, TensorView const& dq, TensorView const& dk, TensorView const& dv,
                           BackwardOptions const& options) {
  require_float("q", q);
  Named const nq = named("q", q, options.layout);
  Named const nk = named("k", k, options.layout);
  Named const nv = named("v", v, options.layout);
  for (auto const& [argument, t] :
       {Argument{"k", &k}, Argument{"v", &v}, Argument{"out", &out}, Argument{"dout", &dout}, Argument{"dq", &dq},
        Argument{"dk", &dk}, Argument{"dv", &dv}}) {
    require_same_type(argument, *t, q);
  }
  require_dtype(config, q);
  BackwardParams p{};
  p.forward = checked_problem(q, k, v, nq, nk, nv, options.scale);
  bool const gpu = q.device.type == DeviceType::cuda;
  Arch const arch = arch_of(q.device);
  require_kernel(q.dtype, arch, "q: ");
  check_config(config, arch);
  require_width(config, p.forward);

  require_shape_of_out("out", out, q, nv.d);
  require_shape_of_out("dout", dout, q, nv.d);
  p.forward.out = out.data;
  Named const no = named("out", out, options.layout), ndout = named("dout", dout, options.layout);
  p.forward.out_stride = no.stride;
  p.dout = dout.data;
  p.dout_stride = ndout.stride;

  std::vector<int64_t> const rows{nq.batch, nq.head, nq.row};
  require_shape("lse", lse, lse_dtype(q.dtype), q.device, rows, lse_dimensions, true);
  p.forward.lse = lse.data;
  if (dlse != nullptr) {
    require_shape("dlse", *dlse, lse_dtype(q.dtype), q.device, rows, lse_dimensions, false);
    p.dlse = dlse->data;
    p.dlse_stride = {.batch = dlse->strides[0], .row = dlse->strides[2], .head = dlse->strides[1]};
  }

  Argument const gradients[] = {{"dq", &dq}, {"dk", &dk}, {"dv", &dv}};
  Named const ndq = checked_gradient(gradients[0], {"q", &q}, options.layout);
  Named const ndk = checked_gradient(gradients[1], {"k", &k}, options.layout);
  Named const ndv = checked_gradient(gradients[2], {"v", &v}, options.layout);
  p.dq_stride = ndq.stride;
  p.dk_stride = ndk.stride;
  p.dv_stride = ndv.stride;
  std::vector<Argument> others{{"q", &q}, {"k", &k}, {"v", &v}, {"out", &out}, {"lse", &lse}, {"dout", &dout}};
  if (dlse != nullptr) others.push_back({"dlse", dlse});
  for (Argument const& gradient : gradients) {
    for (auto const& [name, other] : others) require_separate(gradient.name, *gradient.tensor, name, *other);
    others.push_back(gradient);
  }
  p.dq = dq.data;
  p.dk = dk.data;
  p.dv = dv.data;

  if (gpu) {
    std::pair<Argument, Named> const copied[] = {{{"q", &q}, nq},     {{"k", &k}, nk},          {{"v", &v}, nv},
                                                 {{"out", &out}, no}, {{"dout", &dout}, ndout}, {{"dq", &dq}, ndq},
                                                 {{"dk", &dk}, ndk},  {{"dv", &dv}, ndv}};
    for (auto const& [argument, n] : copied) require_aligned(argument, n, config.copy_bytes);
    BackwardWorkspace const workspace = checked_workspace_of(config, nq);
    require_grid(KeyTile::count(p.forward, config.block_n), "k: batch * kv_heads * ceil(seqlen_k / block_n)");
    float* const start = checked_workspace(options.workspace, workspace.total(), q.device, others);
    p.delta = start;
    if (workspace.dq_sums > 0) p.dq_sums = start + workspace.delta;
  }
  return {config, {.mask = options.causal ? MaskKind::causal : MaskKind::full}, p, q.device};
}

}  // namespace flashcute
