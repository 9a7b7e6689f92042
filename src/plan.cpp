#include "plan.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <tuple>
#include <vector>

#include "driver.hpp"
#include "memory_overlap.hpp"

namespace flashcute {
namespace {

std::string shape_text(TensorView const& t) {
  std::string text = "(";
  for (int i = 0; i < std::min(t.rank, 4); ++i) text += (i > 0 ? ", " : "") + std::to_string(t.shape[i]);
  return text + (t.rank > 4 ? ", ...)" : ")");
}

/// A tensor with its dimensions by name, whatever their order in memory.
struct Named {
  int64_t batch, row, head, d;  // sizes
  Strides stride;
};

void require_rank(char const* argument, TensorView const& t, int rank, char const* dimensions) {
  if (t.rank == rank) return;
  throw ArgumentError(argument, std::to_string(rank) + " dimensions " + dimensions,
                      std::to_string(t.rank) + " (shape " + shape_text(t) + ")");
}

Named named(char const* argument, TensorView const& t, Layout layout) {
  bool const bshd = layout == Layout::bshd;
  require_rank(argument, t, 4, bshd ? "(batch, seqlen, heads, head_dim)" : "(batch, heads, seqlen, head_dim)");
  int const row = bshd ? 1 : 2, head = bshd ? 2 : 1;
  bool const empty = t.shape[0] * t.shape[1] * t.shape[2] * t.shape[3] == 0;  // its strides mean nothing
  if (t.strides[3] != 1 && t.shape[3] > 1 && !empty) {
    throw ArgumentError(argument, "last stride 1", std::to_string(t.strides[3]),
                        "Nothing is copied silently: pass a contiguous copy");
  }
  if (t.data == nullptr && !empty) {
    throw ArgumentError(argument, "a tensor with memory", "one without (a fake or wrapper tensor)");
  }
  // A dimension of size 1 is never stepped over: its stride may be anything, so it is made harmless.
  auto const stride = [&](int i) { return t.shape[i] > 1 && !empty ? t.strides[i] : 0; };
  return {t.shape[0], t.shape[row], t.shape[head], t.shape[3], {stride(0), stride(row), stride(head)}};
}

void require_equal(char const* argument, char const* what, int64_t got, char const* other, int64_t expected) {
  if (got == expected) return;
  throw ArgumentError(argument, std::string(what) + " " + std::to_string(expected) + " as in " + other,
                      std::to_string(got));
}

/// Why nothing larger than `bytes` at a time can be copied from or to a tensor; "" if `bytes` can.
std::string alignment_problem(char const* argument, TensorView const& t, Named const& n, int32_t bytes) {
  if (n.batch * n.row * n.head * n.d == 0) return "";
  auto const problem = [&](std::string const& what) { return std::string(argument) + "'s " + what; };
  if (auto const past = reinterpret_cast<std::uintptr_t>(t.data) % static_cast<unsigned>(bytes); past != 0) {
    return problem("address is " + std::to_string(past) + " bytes past a multiple of " + std::to_string(bytes));
  }
  int64_t const elements = bytes / size_of(t.dtype);
  for (auto const& [what, count] :
       {std::pair{"head_dim", n.d}, std::pair{"batch stride", n.stride.batch}, std::pair{"seqlen stride", n.stride.row},
        std::pair{"heads stride", n.stride.head}}) {
    if (count % elements == 0) continue;
    return problem(std::string(what) + " " + std::to_string(count) + " is no multiple of " + std::to_string(elements) +
                   " elements (" + std::to_string(bytes) + " bytes)");
  }
  return "";
}

/// The kernels copy `copy_bytes` at a time.
void require_aligned(char const* argument, TensorView const& t, Named const& n, ForwardConfig const& config) {
  std::string const problem = alignment_problem(argument, t, n, config.copy_bytes);
  if (problem.empty()) return;
  int32_t fitting = config.copy_bytes;
  while (fitting > size_of(t.dtype) && !alignment_problem(argument, t, n, fitting).empty()) fitting /= 2;
  throw ConfigError("cfg: copy_bytes " + std::to_string(config.copy_bytes) + " does not fit the tensors: " + problem +
                    ". Use copy_bytes=" + std::to_string(fitting) + (fitting < 4 ? " with async_copy=False" : "") +
                    ", or flash_attention, which chooses by itself");
}

void require_length(char const* argument, char const* what, int64_t value) {
  constexpr int64_t limit = std::numeric_limits<int32_t>::max() - 1024;  // room to round up to a tile
  if (value <= limit) return;
  throw ArgumentError(argument, std::string(what) + " at most " + std::to_string(limit), std::to_string(value));
}

double checked_scale(std::optional<double> scale, int64_t d) {
  if (!scale) return d > 0 ? 1.0 / std::sqrt(static_cast<double>(d)) : 1.0;
  if (!std::isfinite(*scale) || *scale < 0) {
    throw ArgumentError("scale", "a finite number >= 0", std::to_string(*scale));
  }
  // The kernels multiply by scale * log2(e) in float.
  if (*scale * std::numbers::log2e > std::numeric_limits<float>::max()) {
    throw ArgumentError("scale", "at most 2e38", std::to_string(*scale));
  }
  return *scale;
}

/// "dtype=bfloat16, head_dim=128, ...": every option with its value.
std::string describe(ForwardConfig const& config) {
  std::string text;
  for_each_option(config, [&](char const* option, auto value) {
    if (!text.empty()) text += ", ";
    text += std::string(option) + "=";
    if constexpr (std::is_enum_v<decltype(value)>) {
      text += name_of(value);
    } else if constexpr (std::is_same_v<decltype(value), bool>) {
      text += value ? "True" : "False";
    } else {
      text += std::to_string(value);
    }
  });
  return text;
}

void require_float(char const* argument, TensorView const& t) {
  if (t.dtype != DType::int32) return;
  throw ArgumentError(argument, "dtype float16, bfloat16, float32 or float64", name_of(t.dtype));
}

void require_head_dim(char const* argument, int64_t d) {
  if (d < 1 || d > 256) throw ArgumentError(argument, "head_dim between 1 and 256", std::to_string(d));
}

void require_writable(char const* argument, TensorView const& t) {
  if (t.read_only) throw ArgumentError(argument, "a writable tensor", "a read-only one");
}

void require_no_overlap(char const* argument, TensorView const& t) {
  if (auto const dimension = overlapping_dimension(t)) {
    throw ArgumentError(
        argument, "every element at an address of its own",
        "stride " + std::to_string(t.strides[*dimension]) + " in dimension " + std::to_string(*dimension));
  }
}

void require_separate(char const* argument, TensorView const& t, char const* other_name, TensorView const& other) {
  if (may_share_an_element(t, other)) {
    throw ArgumentError(argument, "memory of its own", std::string("the memory of ") + other_name);
  }
}

}  // namespace

std::string to_string(Device device) {
  return device.type == DeviceType::cpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

Arch arch_of(Device device) {
  return device.type == DeviceType::cpu ? cpu_arch : cuda::device_facts(device.index).arch;
}

void require_kernel(DType dtype, Arch arch, std::string const& whose) {
  if (arch == cpu_arch) return;
  if (arch < 80) {
    throw DeviceError(whose + "a GPU of compute capability " + std::to_string(arch / 10) + "." +
                      std::to_string(arch % 10) + " is too old: the kernels need 8.0 or later. Use CPU tensors");
  }
  if (dtype == DType::float64) {
    throw UnsupportedError(whose +
                           "dtype float64 has no GPU kernel. Cast to float32, or use "
                           "torch.nn.functional.scaled_dot_product_attention");
  }
}

void check_config(ForwardConfig const& config, Arch arch) {
  ForwardConfigError const error = check(config, arch);
  if (error == ForwardConfigError::none) return;
  std::string message = std::string("cfg: ") + sentence(error) + " (got " + describe(config);
  if (error == ForwardConfigError::smem) {
    message += ": " + std::to_string(smem_bytes(config)) + " of " + std::to_string(max_smem_bytes(arch)) + " bytes";
  }
  if (error == ForwardConfigError::copy_rows) {
    int32_t const rows[] = {CopyShape::of(config, config.head_dim).rows_per_pass,
                            CopyShape::of(config, config.head_dim_v).rows_per_pass};
    message += ": " + std::to_string(max_of(rows[0], rows[1])) + " rows";
  }
  if (arch != cpu_arch)
    message += "; GPU of compute capability " + std::to_string(arch / 10) + "." + std::to_string(arch % 10);
  throw ConfigError(message + ")");
}

ForwardPlan plan_forward(ForwardConfig const& config, TensorView const& q, TensorView const& k, TensorView const& v,
                         TensorView const* out, TensorView const* lse, ForwardOptions const& options) {
  require_float("q", q);
  Named const nq = named("q", q, options.layout);
  Named const nk = named("k", k, options.layout);
  Named const nv = named("v", v, options.layout);

  for (auto const& [argument, t] : {std::pair{"k", &k}, std::pair{"v", &v}, std::pair{"out", out}}) {
    if (t == nullptr) continue;
    if (t->dtype != q.dtype) {
      throw ArgumentError(argument, std::string("dtype ") + name_of(q.dtype) + " as in q", name_of(t->dtype));
    }
    if (t->device != q.device) {
      throw ArgumentError(argument, "device " + to_string(q.device) + " as in q", to_string(t->device));
    }
  }
  if (config.dtype != q.dtype) {
    throw ConfigError(std::string("cfg: dtype ") + name_of(config.dtype) + " does not fit the tensors' " +
                      name_of(q.dtype));
  }

  require_equal("k", "batch size", nk.batch, "q", nq.batch);
  require_equal("v", "batch size", nv.batch, "q", nq.batch);
  require_equal("v", "seqlen", nv.row, "k", nk.row);
  require_equal("v", "number of heads", nv.head, "k", nk.head);
  require_equal("k", "head_dim", nk.d, "q", nq.d);
  if (nq.head > 0 && (nk.head == 0 || nq.head % nk.head != 0)) {
    throw ArgumentError("k", "a number of heads that divides q's " + std::to_string(nq.head), std::to_string(nk.head));
  }
  require_head_dim("q", nq.d);
  require_head_dim("v", nv.d);
  for (auto const& [argument, n] : {std::pair{"q", &nq}, std::pair{"k", &nk}}) {
    require_length(argument, "batch size", n->batch);
    require_length(argument, "seqlen", n->row);
    require_length(argument, "number of heads", n->head);
  }

  ForwardParams p{};
  p.scale = checked_scale(options.scale, nq.d);
  // Base-2 softmax; with scale 0 a masked score must stay -inf, so the factor stays above 0.
  p.scale_log2 = std::max(static_cast<float>(p.scale * std::numbers::log2e), std::numeric_limits<float>::min());

  bool const gpu = q.device.type == DeviceType::cuda;
  Arch const arch = arch_of(q.device);
  require_kernel(q.dtype, arch, "q: ");
  check_config(config, arch);
  for (auto const& [option, compiled, d] :
       {std::tuple{"head_dim", config.head_dim, nq.d}, std::tuple{"head_dim_v", config.head_dim_v, nv.d}}) {
    if (d <= compiled) continue;
    throw ConfigError(std::string("cfg: ") + option + " " + std::to_string(compiled) +
                      " is smaller than the tensors' " + std::to_string(d));
  }
  p.q = q.data;
  p.k = k.data;
  p.v = v.data;
  p.q_stride = nq.stride;
  p.k_stride = nk.stride;
  p.v_stride = nv.stride;
  p.batch = static_cast<int32_t>(nq.batch);
  p.heads = static_cast<int32_t>(nq.head);
  p.kv_heads = static_cast<int32_t>(nk.head);
  p.seqlen_q = static_cast<int32_t>(nq.row);
  p.seqlen_k = static_cast<int32_t>(nk.row);
  p.head_dim = static_cast<int32_t>(nq.d);
  p.head_dim_v = static_cast<int32_t>(nv.d);
  p.causal_offset = p.seqlen_k - p.seqlen_q;

  if (out != nullptr) {
    require_writable("out", *out);
    require_rank("out", *out, 4, "as q has");
    TensorView expected = q;
    expected.shape[3] = nv.d;
    if (out->shape != expected.shape) {
      throw ArgumentError("out", "shape " + shape_text(expected) + " as q, with v's head_dim", shape_text(*out));
    }
    Named const no = named("out", *out, options.layout);
    require_no_overlap("out", *out);
    if (gpu) require_aligned("out", *out, no, config);
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
    require_rank(argument, t, static_cast<int>(shape.size()), dimensions);
    if (t.dtype != dtype) throw ArgumentError(argument, std::string("dtype ") + name_of(dtype), name_of(t.dtype));
    if (t.device != q.device) {
      throw ArgumentError(argument, "device " + to_string(q.device) + " as in q", to_string(t.device));
    }
    int64_t expected_stride = 1;
    for (std::size_t i = shape.size(); i-- > 0;) {
      if (t.shape[i] != shape[i] || (shape[i] > 1 && expected_stride > 0 && t.strides[i] != expected_stride)) {
        std::string sizes;
        for (int64_t const size : shape) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
        throw ArgumentError(argument, std::string("a contiguous tensor ") + dimensions + " = (" + sizes + ")",
                            "shape " + shape_text(t));
      }
      expected_stride *= shape[i];
    }
    for (auto const& [other_name, other] : {std::pair{"q", &q}, std::pair{"k", &k}, std::pair{"v", &v}}) {
      require_separate(argument, t, other_name, *other);
    }
    if (out != nullptr) require_separate(argument, t, "out", *out);
  };
  if (lse != nullptr) {
    require_result("lse", *lse, q.dtype == DType::float64 ? DType::float64 : DType::float32,
                   {nq.batch, nq.head, nq.row}, "(batch, heads, seqlen_q)");
    p.lse = lse->data;
  }
  if (TensorView const* const counts = options.block_counts; counts != nullptr) {
    require_result("block_counts", *counts, DType::int32,
                   {nq.batch, nq.head, ceil_div<int64_t>(nq.row, config.block_m), 3}, "(batch, heads, row blocks, 3)");
    if (lse != nullptr) require_separate("block_counts", *counts, "lse", *lse);
    p.block_counts = static_cast<BlockCounts*>(counts->data);
  }

  if (gpu) {
    require_aligned("q", q, nq, config);
    require_aligned("k", k, nk, config);
    require_aligned("v", v, nv, config);
  }

  Features const features{.mask = options.causal ? MaskKind::causal : MaskKind::full,
                          .count_blocks = options.block_counts != nullptr};
  return {{config, features}, p, q.device};
}

ForwardTensors forward_tensors(TensorView const& q, TensorView const& k, TensorView const& v, TensorView const* out,
                               ForwardOptions const& options, std::string* misaligned) {
  require_float("q", q);
  Named const nq = named("q", q, options.layout);
  Named const nv = named("v", v, options.layout);
  require_head_dim("q", nq.d);
  require_head_dim("v", nv.d);
  ForwardTensors t{q.dtype, static_cast<int32_t>(nq.d), static_cast<int32_t>(nv.d)};
  t.allow_tf32 = options.allow_tf32;
  t.heads = nq.batch * nq.head;
  t.seqlen_q = static_cast<int32_t>(std::min<int64_t>(nq.row, std::numeric_limits<int32_t>::max() - 1024));
  for (auto const& [argument, view] :
       {std::pair{"q", &q}, std::pair{"k", &k}, std::pair{"v", &v}, std::pair{"out", out}}) {
    if (view == nullptr) continue;
    Named const n = named(argument, *view, options.layout);
    for (; t.alignment > size_of(t.dtype); t.alignment /= 2) {
      std::string const problem = alignment_problem(argument, *view, n, t.alignment);
      if (problem.empty()) break;
      if (misaligned != nullptr) *misaligned = problem;
    }
  }
  return t;
}

}  // namespace flashcute
