#include "plan/checks.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <numbers>

#include "cpu/float_mode.hpp"
#include "plan/memory_overlap.hpp"

namespace flashcute {
namespace {

void require_rank(char const* argument, TensorView const& t, int rank, char const* dimensions) {
  if (t.rank == rank) return;
  throw ArgumentError(argument, std::to_string(rank) + " dimensions " + dimensions,
                      std::to_string(t.rank) + " (shape " + shape_text(t) + ")");
}

std::string text_of(std::array<int64_t, 4> const& numbers, int count) {
  std::string text = "(";
  for (int i = 0; i < std::min(count, 4); ++i) text += (i > 0 ? ", " : "") + std::to_string(numbers[i]);
  return text + (count > 4 ? ", ...)" : ")");
}

/// Whether a tensor of rank 3 or 4 has no element: its strides are then meaningless. Throws if the number of its
/// elements, or the distance of any two in bytes, exceeds 64 bits, so that later arithmetic with sizes and strides
/// cannot overflow.
bool is_empty(char const* argument, TensorView const& t) {
  auto const dimensions = static_cast<std::size_t>(t.rank);
  if (std::find(t.shape.begin(), t.shape.begin() + t.rank, 0) != t.shape.begin() + t.rank) return true;
  constexpr int64_t limit = std::numeric_limits<int64_t>::max() / 8;  // elements have at most 8 bytes
  int64_t elements = 1, reach = 0;
  bool countable = true, near = true;
  for (std::size_t i = 0; i < dimensions; ++i) {
    int64_t distance = 0;
    countable = countable && t.shape[i] > 0 && !__builtin_mul_overflow(elements, t.shape[i], &elements);
    near = near && !__builtin_mul_overflow(t.shape[i] - 1, t.strides[i], &distance) && distance >= -limit &&
           !__builtin_add_overflow(reach, std::abs(distance), &reach);
  }
  if (!countable || elements > limit) {
    throw ArgumentError(argument, "at most " + std::to_string(limit) + " elements", "shape " + shape_text(t));
  }
  if (!near || reach > limit) {
    throw ArgumentError(argument,
                        "strides that keep any two elements within " + std::to_string(limit) + " of each other",
                        "shape " + shape_text(t) + " with strides " + text_of(t.strides, t.rank));
  }
  return false;
}

std::string capability_text(Arch arch) { return std::to_string(arch / 10) + "." + std::to_string(arch % 10); }

/// Why `bytes` at a time cannot be copied from or to a tensor; "" if they can.
std::string alignment_problem(Operand const& tensor, int32_t bytes) {
  Named const& n = tensor.dims;
  if (n.batch == 0 || n.row == 0 || n.head == 0 || n.d == 0) return "";
  TensorView const& t = *tensor.view;
  auto const problem = [&](std::string const& what) { return std::string(tensor.name) + "'s " + what; };
  if (auto const past = reinterpret_cast<std::uintptr_t>(t.data) % static_cast<unsigned>(bytes); past != 0) {
    return problem("address is " + std::to_string(past) + " bytes past a multiple of " + std::to_string(bytes));
  }
  int64_t const elements = bytes / size_of(t.dtype);
  for (auto const& [what, count] :
       {std::pair{"head_dim", n.d}, std::pair{"batch stride", n.stride.batch}, std::pair{"seqlen stride", n.stride.row},
        std::pair{"heads stride", n.stride.head}}) {
    if (count % elements == 0) continue;
    return problem(std::string(what) + " " + std::to_string(count) + " is not a multiple of " +
                   std::to_string(elements) + " elements (" + std::to_string(bytes) + " bytes)");
  }
  return "";
}

}  // namespace

std::string to_string(Device device) {
  return device.type == DeviceType::cpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

std::string shape_text(TensorView const& t) { return text_of(t.shape, t.rank); }

Operand operand(char const* name, TensorView const& t, CallOptions const& options) {
  bool const bshd = options.layout == Layout::bshd, packed = is_packed(options);
  if (packed) {
    require_rank(name, t, 3, bshd ? "(total, heads, head_dim), packed" : "(heads, total, head_dim), packed");
  } else {
    require_rank(name, t, 4, bshd ? "(batch, seqlen, heads, head_dim)" : "(batch, heads, seqlen, head_dim)");
  }
  int const last = t.rank - 1, row = bshd ? last - 2 : last - 1, head = bshd ? last - 1 : last - 2;
  bool const empty = is_empty(name, t);
  if (t.strides[last] != 1 && t.shape[last] > 1 && !empty) {
    throw ArgumentError(name, "last stride 1", std::to_string(t.strides[last]),
                        "Nothing is copied silently: pass a contiguous copy");
  }
  if (t.data == nullptr && !empty) {
    throw ArgumentError(name, "a tensor with memory", "one without (a fake or wrapper tensor)");
  }
  // A dimension of size 1 is never stepped over: its stride may be anything, so it is set to 0.
  auto const stride = [&](int i) { return t.shape[i] > 1 && !empty ? t.strides[i] : 0; };
  Strides const strides{packed ? 0 : stride(0), stride(row), stride(head)};
  return {name, &t, {packed ? 1 : t.shape[0], t.shape[row], t.shape[head], t.shape[last], strides}};
}

void require_aligned(Operand const& tensor, int32_t copy_bytes) {
  std::string const problem = alignment_problem(tensor, copy_bytes);
  if (problem.empty()) return;
  int32_t fitting = copy_bytes;
  while (fitting > size_of(tensor.view->dtype) && !alignment_problem(tensor, fitting).empty()) fitting /= 2;
  throw ConfigError("cfg: copy_bytes " + std::to_string(copy_bytes) + " does not fit the tensors: " + problem +
                    ". Use copy_bytes=" + std::to_string(fitting) + (fitting < 4 ? " with async_copy=False" : "") +
                    ", or flash_attention, which chooses by itself");
}

std::string bulk_copy_problem(std::span<Operand const> tensors) {
  constexpr int64_t limit = int64_t{1} << 40;  // of a stride in bytes
  for (Operand const& tensor : tensors) {
    Strides const& s = tensor.dims.stride;
    for (auto const& [what, stride] :
         {std::pair{"batch", s.batch}, std::pair{"seqlen", s.row}, std::pair{"heads", s.head}}) {
      if (stride >= 0 && stride < limit / size_of(tensor.view->dtype)) continue;
      return std::string(tensor.name) + "'s " + what + " stride " + std::to_string(stride) +
             " is not among those that the copy engine (TMA) can follow, which are from 0 to 2^40 bytes";
    }
  }
  return "";
}

int32_t common_alignment(std::span<Operand const> tensors, std::string* misaligned) {
  int32_t alignment = 16;
  for (Operand const& tensor : tensors) {
    for (; alignment > size_of(tensor.view->dtype); alignment /= 2) {
      std::string const problem = alignment_problem(tensor, alignment);
      if (problem.empty()) break;
      if (misaligned != nullptr && misaligned->empty()) *misaligned = problem;
    }
  }
  return alignment;
}

DType require_float(char const* argument, TensorView const& t) {
  for (auto const& row : EnumTable<DType>::rows) {
    if (t.dtype == row.value) return row.value;
  }
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
    throw ArgumentError(argument, "memory of its own", std::string("memory that ") + other_name + " uses too");
  }
}

void require_same_type(char const* argument, TensorView const& t, TensorView const& q) {
  if (t.dtype != q.dtype) {
    throw ArgumentError(argument, std::string("dtype ") + name_of(q.dtype) + " as in q", name_of(t.dtype));
  }
  if (t.device != q.device) {
    throw ArgumentError(argument, "device " + to_string(q.device) + " as in q", to_string(t.device));
  }
}

std::vector<Argument> arrays_of(CallOptions const& o) {
  std::vector<Argument> arrays;
  for (Argument const& each :
       {Argument{"seqlens_q", o.seqlens_q}, Argument{"seqlens_k", o.seqlens_k},
        Argument{"cu_seqlens_q", o.cu_seqlens_q}, Argument{"cu_seqlens_k", o.cu_seqlens_k},
        Argument{"prefix", o.prefixes}, Argument{"sink", o.sink}, Argument{"block_mask", o.block_mask.words}}) {
    if (each.tensor != nullptr) arrays.push_back(each);
  }
  return arrays;
}

void require_shape_of_out(char const* argument, TensorView const& t, TensorView const& q, int64_t head_dim_v) {
  require_rank(argument, t, q.rank, "as q has");
  TensorView expected = q;
  expected.shape[static_cast<std::size_t>(q.rank - 1)] = head_dim_v;
  if (t.shape == expected.shape) return;
  throw ArgumentError(argument, "shape " + shape_text(expected) + " as q, with v's head_dim", shape_text(t));
}

LseShape lse_shape(Named const& q, CallOptions const& options) {
  if (is_packed(options)) return {{q.head, q.row}, "(heads, total_q)"};
  return {{q.batch, q.head, q.row}, "(batch, heads, seqlen_q)"};
}

void require_shape(char const* argument, TensorView const& t, ElementType dtype, Device device,
                   std::vector<int64_t> const& shape, char const* dimensions, bool contiguous) {
  require_rank(argument, t, static_cast<int>(shape.size()), dimensions);
  if (t.dtype != dtype) throw ArgumentError(argument, std::string("dtype ") + name_of(dtype), name_of(t.dtype));
  if (t.device != device) {
    throw ArgumentError(argument, "device " + to_string(device) + " as in q", to_string(t.device));
  }
  // The strides of an empty tensor mean nothing: NumPy 2.5 gives 0 for all of them.
  bool const strides_matter = contiguous && std::find(shape.begin(), shape.end(), 0) == shape.end();
  int64_t expected_stride = 1;
  for (std::size_t i = shape.size(); i-- > 0;) {
    bool const wrong_stride = shape[i] > 1 && t.strides[i] != expected_stride;
    if (t.shape[i] != shape[i] || (strides_matter && wrong_stride)) {
      std::string sizes;
      for (int64_t const size : shape) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
      throw ArgumentError(
          argument, std::string(contiguous ? "a contiguous tensor " : "shape ") + dimensions + " = (" + sizes + ")",
          "shape " + shape_text(t));
    }
    expected_stride *= shape[i];
  }
}

void throw_config_error(char const* sentence, std::string const& options, std::string const& details, Arch arch) {
  std::string message = std::string("cfg: ") + sentence + " (got " + options;
  if (!details.empty()) message += ": " + details;
  if (arch != cpu_arch) message += "; GPU of compute capability " + capability_text(arch);
  throw ConfigError(message + ")");
}

void require_grid(int64_t blocks, char const* what) {
  if (blocks <= std::numeric_limits<int32_t>::max()) return;
  throw UnsupportedError(
      std::string(what) + " makes " + std::to_string(blocks) +
      " thread blocks, and a CUDA launch can have 2147483647 at most. Split the batch into several calls");
}

void require_capability(Arch arch, std::string const& whose) {
  if (arch == cpu_arch || arch >= 80) return;
  throw DeviceError(whose + "a GPU of compute capability " + capability_text(arch) +
                    " is too old: the kernels need 8.0 or later. Use CPU tensors");
}

}  // namespace flashcute
