#include "plan/call.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/float_mode.hpp"
#include "flashcute/core/constants.hpp"
#include "plan/block_mask.hpp"

namespace flashcute {
namespace {

void require_equal(char const* argument, char const* what, int64_t got, char const* other, int64_t expected) {
  if (got == expected) return;
  throw ArgumentError(argument, std::string(what) + " " + std::to_string(expected) + " as in " + other,
                      std::to_string(got));
}

void require_length(char const* argument, char const* what, int64_t value) {
  constexpr int64_t limit = std::numeric_limits<int32_t>::max() - 1024;  // room to round up to a tile
  if (value <= limit) return;
  throw ArgumentError(argument, std::string(what) + " at most " + std::to_string(limit), std::to_string(value));
}

double checked_scale(std::optional<double> scale, int64_t d) {
  cpu::DefaultFloatMode const mode;  // otherwise the default would depend on the rounding mode of the caller's thread
  if (!scale) return d > 0 ? 1.0 / std::sqrt(static_cast<double>(d)) : 1.0;
  if (!std::isfinite(*scale) || *scale < 0) {
    throw ArgumentError("scale", "a finite number >= 0", std::to_string(*scale));
  }
  // The kernels multiply by scale * log2(e) in float.
  if (*scale * log2_e<double> > std::numeric_limits<float>::max()) {
    throw ArgumentError("scale", "at most 2e38", std::to_string(*scale));
  }
  return *scale;
}

/// Whether a call has none of the options that may take the band.
bool options_are_plain(CallOptions const& o) {
  return !has_window(o) && !has_lengths(o) && !is_packed(o) && !has_prefix(o) && o.sink == nullptr &&
         !has_block_mask(o);
}

/// The first and the last key that a query sees, from its own number on. Beyond -seqlen_q and seqlen_k they show or
/// hide nothing more, unless sequences are shorter than the tensors.
void set_diagonals(CallOptions const& options, ForwardParams& p) {
  using Limits = std::numeric_limits<int64_t>;
  for (std::optional<int64_t> const n : {options.window_left, options.window_right}) {
    if (n && *n < 0) throw ArgumentError("window", "two counts >= 0, or -1 for no limit", std::to_string(*n));
  }
  int64_t const diagonal = options.diagonal.value_or(int64_t{p.seqlen_k} - p.seqlen_q);
  // With the smallest or the largest number where 64 bits do not hold a sum.
  int64_t first = Limits::min(), last = diagonal;
  if (options.window_left && __builtin_sub_overflow(diagonal, *options.window_left, &first)) first = Limits::min();
  if (!options.causal || has_prefix(options)) {
    last = Limits::max();
    if (options.window_right && __builtin_add_overflow(diagonal, *options.window_right, &last)) last = Limits::max();
  }
  using Offset = std::numeric_limits<int32_t>;
  bool const move = (has_lengths(options) || is_packed(options)) && !options.diagonal;
  auto const held = [&](int64_t x) {
    return static_cast<int32_t>(
        std::clamp<int64_t>(x, move ? Offset::min() : -p.seqlen_q, move ? Offset::max() : p.seqlen_k));
  };
  p.causal_offset = held(last);
  p.window_offset = held(first);
  p.sequences.prefix_offset = held(diagonal);
  p.sequences.from_end = !options.diagonal;
}

/// Throws unless the elements of an array can be read one by one.
void require_memory(char const* argument, TensorView const& t) {
  auto const address = reinterpret_cast<std::uintptr_t>(t.data);
  auto const size = static_cast<std::uintptr_t>(size_of(t.dtype));
  if (t.shape[0] == 0 || (t.data != nullptr && address % size == 0)) return;
  throw ArgumentError(argument, "an address that is a multiple of " + std::to_string(size) + " bytes",
                      t.data == nullptr ? "none" : "one " + std::to_string(address % size) + " bytes past it");
}

/// What lies in memory beside q, k and v.
void set_arrays(CallOptions const& options, DType dtype, Device device, ForwardParams& p) {
  auto const integers = [&](char const* argument, TensorView const* t, int64_t count,
                            char const* dimensions) -> int32_t const* {
    if (t == nullptr) return nullptr;
    require_shape(argument, *t, ElementType::int32, device, {count}, dimensions, true);
    require_memory(argument, *t);
    return static_cast<int32_t const*>(t->data);
  };
  int64_t entries = p.batch;
  if (is_packed(options)) {
    p.sequences.count = sequences_of(options, int64_t{p.seqlen_q} + p.seqlen_k);
    entries = p.sequences.count;
    char const* const dimensions = "(sequences + 1,)";
    p.sequences.cu_seqlens_q = integers("cu_seqlens_q", options.cu_seqlens_q, entries + 1, dimensions);
    p.sequences.cu_seqlens_k = options.cu_seqlens_k == nullptr
                                   ? p.sequences.cu_seqlens_q
                                   : integers("cu_seqlens_k", options.cu_seqlens_k, entries + 1, dimensions);
  } else if (options.cu_seqlens_k != nullptr) {
    throw ArgumentError("cu_seqlens_k", "none without cu_seqlens_q", "an array");
  }
  auto const per_batch = [&](char const* argument, TensorView const* t) {
    return integers(argument, t, entries, is_packed(options) ? "(sequences,)" : "(batch,)");
  };
  p.sequences.seqlens_q = per_batch("seqlens_q", options.seqlens_q);
  p.sequences.seqlens_k = per_batch("seqlens_k", options.seqlens_k);
  if (has_prefix(options) && !options.causal) throw ArgumentError("prefix", "causal=True with it", "causal=False");
  if (options.prefix && *options.prefix < 0) {
    throw ArgumentError("prefix", "a number >= 0", std::to_string(*options.prefix));
  }
  p.sequences.prefixes = per_batch("prefix", options.prefixes);
  int64_t const none = SequenceParams::no_prefix;
  p.sequences.prefix = static_cast<int32_t>(std::min(options.prefix.value_or(none), none));
  if (TensorView const* const sink = options.sink; sink != nullptr) {
    bool const float32 = sink->dtype == ElementType::float32;
    if (!float32 && sink->dtype != dtype) {
      throw ArgumentError("sink", std::string("dtype float32 or q's ") + name_of(dtype), name_of(sink->dtype));
    }
    require_shape("sink", *sink, float32 ? ElementType::float32 : element_type(dtype), device, {p.heads}, "(heads,)",
                  true);
    require_memory("sink", *sink);
    p.sink.logits = sink->data;
    p.sink.float32 = float32;
  }
  if (has_block_mask(options)) p.map = checked_block_mask(options, device, p);
}

/// Checks the sizes of q, k and v against each other, and the scale.
ForwardParams checked_params(Operand const& q, Operand const& k, Operand const& v, DType dtype,
                             CallOptions const& options) {
  Named const &nq = q.dims, &nk = k.dims, &nv = v.dims;
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
  p.scale_log2 = std::max(static_cast<float>(p.scale * log2_e<double>), std::numeric_limits<float>::min());
  p.q = q.view->data;
  p.k = k.view->data;
  p.v = v.view->data;
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
  if (options.causal || !options_are_plain(options))
    require_length("k", "with these options a seqlen that is, with q's,", nq.row + nk.row);
  set_diagonals(options, p);
  set_arrays(options, dtype, q.view->device, p);
  return p;
}

}  // namespace

int32_t sequences_of(CallOptions const& options, int64_t rows) {
  TensorView const& starts = *options.cu_seqlens_q;
  if (starts.rank != 1 || starts.shape[0] < 1) {
    throw ArgumentError("cu_seqlens_q", "shape (sequences + 1,)", "shape " + shape_text(starts));
  }
  require_length("cu_seqlens_q", "a number of sequences that is, with the rows of the tensors,",
                 starts.shape[0] - 1 + rows);
  return static_cast<int32_t>(starts.shape[0] - 1);
}

Call checked_call(TensorView const& q, TensorView const& k, TensorView const& v, CallOptions const& options) {
  DType const dtype = require_float("q", q);
  require_same_type("k", k, q);
  require_same_type("v", v, q);
  Call call{.q = operand("q", q, options),
            .k = operand("k", k, options),
            .v = operand("v", v, options),
            .dtype = dtype,
            .options = options,
            .params = {},
            .device = q.device,
            .arch = cpu_arch};
  call.params = checked_params(call.q, call.k, call.v, dtype, options);
  call.arch = arch_of(q.device);
  return call;
}

void require_kernel(DType dtype, Arch arch, std::string const& whose) {
  require_capability(arch, whose);
  if (arch != cpu_arch && dtype == DType::float64) {
    throw UnsupportedError(whose +
                           "dtype float64 has no GPU kernel. Cast to float32, or use "
                           "torch.nn.functional.scaled_dot_product_attention");
  }
}

void check_problem(TensorView const& q, TensorView const& k, TensorView const& v, CallOptions const& options) {
  checked_call(q, k, v, options);
}

}  // namespace flashcute
