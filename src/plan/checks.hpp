// Checks of tensors and options that the plans of forward and backward share. Each throws ArgumentError, or
// ConfigError, with what came and what is allowed.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "flashcute/api.hpp"
#include "flashcute/core/forward_params.hpp"

namespace flashcute {

/// "(2, 5, 64)"
std::string shape_text(TensorView const& t);

/// A tensor's dimensions by name, whatever their order in memory.
struct Named {
  int64_t batch, row, head, d;  // sizes
  Strides stride;

  int64_t all_heads() const { return row == 0 ? 0 : batch * head; }  // that have rows
};

/// A tensor of a call, with its name and dimensions.
struct Operand {
  char const* name;
  TensorView const* view;
  Named dims;
};

/// Checks that a tensor has rank 4 (packed: 3, which is a batch of one), memory and unit last stride, and that the
/// number of its elements and the distance of any two, in bytes too, fit 64 bits. The stride of a dimension of size 1
/// becomes 0.
Operand operand(char const* name, TensorView const& t, CallOptions const& options);

/// Throws unless a kernel that copies `copy_bytes` at a time can read or write the tensor.
void require_aligned(Operand const& tensor, int32_t copy_bytes);

/// Why TMA cannot read one of the tensors, whose rows and strides are multiples of 16 bytes; "" if it can read all.
std::string bulk_copy_problem(std::span<Operand const> tensors);

/// How many bytes, at most 16, can be copied at a time from and to all tensors. If that is less than 16, `misaligned`,
/// if given and empty, receives the reason.
int32_t common_alignment(std::span<Operand const> tensors, std::string* misaligned = nullptr);

/// The DType of a tensor; throws if kernels do not compute with its type.
DType require_float(char const* argument, TensorView const& t);
void require_head_dim(char const* argument, int64_t d);
void require_same_type(char const* argument, TensorView const& t, TensorView const& q);
void require_writable(char const* argument, TensorView const& t);
void require_no_overlap(char const* argument, TensorView const& t);
void require_separate(char const* argument, TensorView const& t, char const* other_name, TensorView const& other);

/// The tensors among the options.
std::vector<Argument> arrays_of(CallOptions const& options);

/// `dimensions` names those of `shape`: "(batch, heads, seqlen_q)".
void require_shape(char const* argument, TensorView const& t, ElementType dtype, Device device,
                   std::vector<int64_t> const& shape, char const* dimensions, bool contiguous);

/// Throws unless t, the output or its gradient, has q's shape with v's head_dim.
void require_shape_of_out(char const* argument, TensorView const& t, TensorView const& q, int64_t head_dim_v);

/// The shape of the LSE and of the numbers of query blocks, without their last dimensions, and their names.
struct LseShape {
  std::vector<int64_t> sizes;
  char const* dimensions;
};
LseShape lse_shape(Named const& q, CallOptions const& options);
inline ElementType lse_dtype(DType dtype) {
  return dtype == DType::float64 ? ElementType::float64 : ElementType::float32;
}

// ---- configurations ----------------------------------------------------------------------------------

/// Throws a ConfigError for a rule that a configuration breaks: the sentence of the rule, the options, and details.
[[noreturn]] void throw_config_error(char const* sentence, std::string const& options, std::string const& details,
                                     Arch arch);

/// Throws UnsupportedError unless a launch can have `blocks` thread blocks. `what` says how their number follows from
/// the arguments: "q: batch * heads".
void require_grid(int64_t blocks, char const* what);

/// Throws DeviceError if a GPU is too old for all kernels. `whose` starts the message: "q: " or "".
void require_capability(Arch arch, std::string const& whose);

}  // namespace flashcute
