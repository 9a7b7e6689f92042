#include "plan.hpp"

#include <limits>
#include <span>
#include <vector>

#include "checks.hpp"
#include "driver.hpp"
#include "flashcute/query_tile.hpp"
#include "text.hpp"

namespace flashcute {
namespace {

/// All tensors have q's dtype and device, and the dtype is one to compute with.
void require_one_type(TensorView const& q, TensorView const& k, TensorView const& v, TensorView const* out) {
  require_float("q", q);
  for (auto const& [argument, t] : {std::pair{"k", &k}, std::pair{"v", &v}, std::pair{"out", out}}) {
    if (t != nullptr) require_same_type(argument, *t, q);
  }
}

}  // namespace

Arch arch_of(Device device) {
  return device.type == DeviceType::cpu ? cpu_arch : cuda::device_facts(device.index).arch;
}

void require_kernel(DType dtype, Arch arch, std::string const& whose) {
  require_capability(arch, whose);
  if (arch != cpu_arch && dtype == DType::float64) {
    throw UnsupportedError(whose +
                           "dtype float64 has no GPU kernel. Cast to float32, or use "
                           "torch.nn.functional.scaled_dot_product_attention");
  }
}

void check_config(ForwardConfig const& config, Arch arch) {
  ForwardConfigError const error = check(config, arch);
  if (error == ForwardConfigError::none) return;
  std::string details;
  if (error == ForwardConfigError::smem) {
    details = std::to_string(smem_bytes(config)) + " of " + std::to_string(max_smem_bytes(arch)) + " bytes";
  }
  if (error == ForwardConfigError::copy_rows) {
    int32_t const rows[] = {CopyShape::of(config, config.head_dim).rows_per_pass,
                            CopyShape::of(config, config.head_dim_v).rows_per_pass};
    details = std::to_string(max_of(rows[0], rows[1])) + " rows";
  }
  throw_config_error(sentence(error), options_text(config, arch != cpu_arch, sentence(error)), details, arch);
}

ForwardPlan plan_forward(ForwardConfig const& config, TensorView const& q, TensorView const& k, TensorView const& v,
                         TensorView const* out, TensorView const* lse, ForwardOptions const& options) {
  require_one_type(q, k, v, out);
  Named const nq = named("q", q, options.layout);
  Named const nk = named("k", k, options.layout);
  Named const nv = named("v", v, options.layout);

  require_dtype(config, q);
  ForwardParams p = checked_problem(q, k, v, nq, nk, nv, options.scale);

  bool const gpu = q.device.type == DeviceType::cuda;
  Arch const arch = arch_of(q.device);
  require_kernel(q.dtype, arch, "q: ");
  check_config(config, arch);
  require_width(config, p);

  if (out != nullptr) {
    require_writable("out", *out);
    require_shape_of_out("out", *out, q, nv.d);
    Named const no = named("out", *out, options.layout);
    require_no_overlap("out", *out);
    if (gpu) require_aligned({"out", out}, no, config.copy_bytes);
    require_separate("out", *out, "q", q);
    require_separate("out", *out, "k", k);
    require_separate("out", *out, "v", v);
    p.out = out->data;
    p.out_stride = no.stride;
  }
  /// A contiguous result beside `out`, in memory of its own.
  auto const require_result = [&](char const* argument, TensorView const& t, DType dtype,
                                  std::vector<int64_t> const& shape, char const* dimensions) {
    require_writable(argument, t);
    require_shape(argument, t, dtype, q.device, shape, dimensions, true);
    for (auto const& [other_name, other] : {std::pair{"q", &q}, std::pair{"k", &k}, std::pair{"v", &v}}) {
      require_separate(argument, t, other_name, *other);
    }
    if (out != nullptr) require_separate(argument, t, "out", *out);
  };
  if (lse != nullptr) {
    require_result("lse", *lse, lse_dtype(q.dtype), {nq.batch, nq.head, nq.row}, lse_dimensions);
    p.lse = lse->data;
  }
  if (TensorView const* const counts = options.block_counts; counts != nullptr) {
    require_result("block_counts", *counts, DType::int32,
                   {nq.batch, nq.head, ceil_div<int64_t>(nq.row, tile_rows(config)), 3},
                   "(batch, heads, row blocks, 3)");
    if (lse != nullptr) require_separate("block_counts", *counts, "lse", *lse);
    p.block_counts = static_cast<BlockCounts*>(counts->data);
  }

  if (gpu) {
    require_grid(QueryTile::count(p, tile_rows(config)) * config.cluster,
                 "q: batch * heads * ceil(seqlen_q / block_m)");
    require_aligned({"q", &q}, nq, config.copy_bytes);
    require_aligned({"k", &k}, nk, config.copy_bytes);
    require_aligned({"v", &v}, nv, config.copy_bytes);
  }
  if (config.math == Math::wgmma) {
    Argument const arguments[] = {{"q", &q}, {"k", &k}, {"v", &v}};
    if (std::string const problem = bulk_copy_problem(arguments, options.layout); !problem.empty()) {
      throw ConfigError("cfg: math wgmma does not fit the tensors: " + problem +
                        ". Use math='tensor_core', or flash_attention, which chooses by itself");
    }
  }

  return {{config, features_of(options)}, p, q.device};
}

Features features_of(ForwardOptions const& options) {
  return {.mask = options.causal ? MaskKind::causal : MaskKind::full, .count_blocks = options.block_counts != nullptr};
}

ForwardTensors forward_tensors(TensorView const& q, TensorView const& k, TensorView const& v, TensorView const* out,
                               ForwardOptions const& options, std::string* misaligned) {
  require_one_type(q, k, v, out);
  Named const nq = named("q", q, options.layout);
  Named const nv = named("v", v, options.layout);
  require_head_dim("q", nq.d);
  require_head_dim("v", nv.d);
  ForwardTensors t{q.dtype, static_cast<int32_t>(nq.d), static_cast<int32_t>(nv.d)};
  t.allow_tf32 = options.allow_tf32;
  t.heads = nq.all_heads();
  t.seqlen_q = static_cast<int32_t>(std::min<int64_t>(nq.row, std::numeric_limits<int32_t>::max() - 1024));
  std::vector<Argument> arguments{{"q", &q}, {"k", &k}, {"v", &v}};
  if (out != nullptr) arguments.push_back({"out", out});
  t.alignment = common_alignment(arguments, options.layout, misaligned);
  std::string const problem = bulk_copy_problem(std::span(arguments).first(3), options.layout);  // out is not loaded
  t.bulk_copies = problem.empty();
  if (misaligned != nullptr && misaligned->empty()) *misaligned = problem;
  return t;
}

}  // namespace flashcute
