#include "plan/plan_forward.hpp"

#include <span>
#include <vector>

#include "flashcute/policy/query_tile.hpp"
#include "launch/driver.hpp"
#include "plan/checks.hpp"
#include "plan/text.hpp"

namespace flashcute {
namespace {

/// Checks `out`, and returns it with its dimensions.
Operand checked_out(TensorView const& out, Call const& call) {
  require_same_type("out", out, *call.q.view);
  require_writable("out", out);
  require_shape_of_out("out", out, *call.q.view, call.v.dims.d);
  Operand const operand_out = operand("out", out, call.options);
  require_no_overlap("out", out);
  for (Operand const* other : {&call.q, &call.k, &call.v}) require_separate("out", out, other->name, *other->view);
  for (auto const& [name, other] : arrays_of(call.options)) require_separate("out", out, name, *other);
  return operand_out;
}

}  // namespace

Arch arch_of(Device device) {
  return device.type == DeviceType::cpu ? cpu_arch : cuda::device_facts(device.index).arch;
}

void check_config(ForwardConfig const& config, Arch arch) {
  ForwardConfigError const error = check(config, arch);
  if (error == ForwardConfigError::none) return;
  std::string details;
  if (error == ForwardConfigError::smem) {
    details = std::to_string(smem_bytes(config)) + " of " + std::to_string(max_smem_bytes(arch)) + " bytes";
  }
  if (error == ForwardConfigError::copy_rows) {
    int32_t const rows[] = {CopyShape::of(tile_of(config), config.head_dim).rows_per_pass,
                            CopyShape::of(tile_of(config), config.head_dim_v).rows_per_pass};
    details = std::to_string(max_of(rows[0], rows[1])) + " rows";
  }
  if (error == ForwardConfigError::other_kernel) details = options_of_other_kernels(config);
  throw_config_error(sentence(error), options_text(config, arch != cpu_arch, sentence(error)), details, arch);
}

ForwardPlan plan_forward(ForwardConfig const& config, Call const& call, ForwardOutputs const& outputs) {
  require_kernel(call);
  require_fits(config, call);
  ForwardParams p = call.params;
  Named const& nq = call.q.dims;

  if (outputs.out != nullptr) {
    Operand const out = checked_out(*outputs.out, call);
    if (call.on_gpu()) require_aligned(out, config.copy_bytes);
    p.out = out.view->data;
    p.out_stride = out.dims.stride;
  }
  /// Checks a contiguous output other than `out`.
  auto const require_result = [&](char const* argument, TensorView const& t, ElementType dtype,
                                  std::vector<int64_t> const& shape, char const* dimensions) {
    require_writable(argument, t);
    require_shape(argument, t, dtype, call.device, shape, dimensions, true);
    for (Operand const* other : {&call.q, &call.k, &call.v}) require_separate(argument, t, other->name, *other->view);
    for (auto const& [name, other] : arrays_of(call.options)) require_separate(argument, t, name, *other);
    if (outputs.out != nullptr) require_separate(argument, t, "out", *outputs.out);
  };
  if (outputs.lse != nullptr) {
    LseShape const shape = lse_shape(nq, call.options);
    require_result("lse", *outputs.lse, lse_dtype(config.dtype), shape.sizes, shape.dimensions);
    p.lse = outputs.lse->data;
  }
  if (TensorView const* const counts = outputs.block_counts; counts != nullptr) {
    std::vector<int64_t> shape = lse_shape(nq, call.options).sizes;
    shape.back() = query_blocks(p, call.on_gpu() ? tile_rows(config) : config.block_m);
    shape.push_back(3);
    require_result("block_counts", *counts, ElementType::int32, shape,
                   is_packed(call.options) ? "(heads, slots, 3)" : "(batch, heads, row blocks, 3)");
    if (outputs.lse != nullptr) require_separate("block_counts", *counts, "lse", *outputs.lse);
    p.block_counts = static_cast<BlockCounts*>(counts->data);
  }

  Operand const loaded[] = {call.q, call.k, call.v};
  if (call.on_gpu()) {
    require_grid(count_query_tiles(p, tile_rows(config)) * config.cluster,
                 is_packed(call.options) ? "q: heads * (total_q / block_m + sequences + 2)"
                                         : "q: batch * heads * ceil(seqlen_q / block_m)");
    for (Operand const& tensor : loaded) require_aligned(tensor, config.copy_bytes);
  }
  if (call.on_gpu() && config.kernel == Kernel::sm90) {
    if (std::string const problem = bulk_copy_problem(loaded); !problem.empty()) {
      throw ConfigError("cfg: kernel sm90 does not fit the tensors: " + problem +
                        ". Use kernel='sm80', or flash_attention, which chooses by itself");
    }
  }
  return {kernel_of(config, features_of(call, outputs.block_counts != nullptr)), p, call.device};
}

Features features_of(Call const& call, bool count_blocks) {
  return {.mask = call.mask(), .count_blocks = count_blocks};
}

ForwardTensors forward_tensors(Call const& call, TensorView const* out, std::string* misaligned) {
  ForwardTensors t{call.dtype, call.params.head_dim, call.params.head_dim_v};
  t.allow_tf32 = call.options.allow_tf32;
  t.heads = call.q.dims.all_heads();
  t.seqlen_q = call.params.seqlen_q;
  std::vector<Operand> copied{call.q, call.k, call.v};
  if (out != nullptr) {
    require_same_type("out", *out, *call.q.view);
    copied.push_back(operand("out", *out, call.options));
  }
  t.alignment = common_alignment(copied, misaligned);
  std::string const problem = bulk_copy_problem(std::span(copied).first(3));  // out is not loaded
  t.bulk_copies = problem.empty();
  if (misaligned != nullptr && misaligned->empty()) *misaligned = problem;
  return t;
}

}  // namespace flashcute
