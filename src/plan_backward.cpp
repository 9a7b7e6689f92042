#include "plan_backward.hpp"

#include "checks.hpp"

namespace flashcute {
namespace {

struct Argument {
  char const* name;
  TensorView const* tensor;
};

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

void require_backend(Device device) {
  if (device.type == DeviceType::cpu) return;
  throw UnsupportedError("q: device " + to_string(device) +
                         " has no backward kernel yet. Use CPU tensors, or train with "
                         "torch.nn.functional.scaled_dot_product_attention");
}

}  // namespace

void check_config(BackwardConfig const& config, Arch arch) {
  BackwardConfigError const error = check(config, arch);
  if (error == BackwardConfigError::none) return;
  throw ConfigError(std::string("cfg: ") + sentence(error) + " (got " + describe(config) + ")");
}

BackwardConfig default_backward_config(DType dtype, int64_t head_dim, Arch arch, std::optional<int64_t> head_dim_v) {
  int64_t const d_v = head_dim_v.value_or(head_dim);
  require_head_dim("head_dim", head_dim);
  require_head_dim("head_dim_v", d_v);
  BackwardConfig const config = cpu_backward_config(dtype, static_cast<int32_t>(head_dim), static_cast<int32_t>(d_v));
  check_config(config, arch);
  return config;
}

BackwardConfig backward_config_for(TensorView const& q, TensorView const& v, BackwardOptions const& options) {
  require_float("q", q);
  require_backend(q.device);
  int64_t const d = named("q", q, options.layout).d, d_v = named("v", v, options.layout).d;
  require_head_dim("q", d);
  require_head_dim("v", d_v);
  return default_backward_config(q.dtype, d, arch_of(q.device), d_v);
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
  require_backend(q.device);
  check_config(config, arch_of(q.device));
  require_width(config, p.forward);

  require_shape_of_out("out", out, q, nv.d);
  require_shape_of_out("dout", dout, q, nv.d);
  p.forward.out = out.data;
  p.forward.out_stride = named("out", out, options.layout).stride;
  p.dout = dout.data;
  p.dout_stride = named("dout", dout, options.layout).stride;

  std::vector<int64_t> const rows{nq.batch, nq.head, nq.row};
  require_shape("lse", lse, lse_dtype(q.dtype), q.device, rows, lse_dimensions, true);
  p.forward.lse = lse.data;
  if (dlse != nullptr) {
    require_shape("dlse", *dlse, lse_dtype(q.dtype), q.device, rows, lse_dimensions, false);
    p.dlse = dlse->data;
    p.dlse_stride = {.batch = dlse->strides[0], .row = dlse->strides[2], .head = dlse->strides[1]};
  }

  Argument const gradients[] = {{"dq", &dq}, {"dk", &dk}, {"dv", &dv}};
  p.dq_stride = checked_gradient(gradients[0], {"q", &q}, options.layout).stride;
  p.dk_stride = checked_gradient(gradients[1], {"k", &k}, options.layout).stride;
  p.dv_stride = checked_gradient(gradients[2], {"v", &v}, options.layout).stride;
  std::vector<Argument> others{{"q", &q}, {"k", &k}, {"v", &v}, {"out", &out}, {"lse", &lse}, {"dout", &dout}};
  if (dlse != nullptr) others.push_back({"dlse", dlse});
  for (Argument const& gradient : gradients) {
    for (auto const& [name, other] : others) require_separate(gradient.name, *gradient.tensor, name, *other);
    others.push_back(gradient);
  }
  p.dq = dq.data;
  p.dk = dk.data;
  p.dv = dv.data;
  return {config, {.mask = options.causal ? MaskKind::causal : MaskKind::full}, p, q.device};
}

}  // namespace flashcute
