// A checked call: all later code reads this, and not the arguments q, k, v and options again.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "flashcute/api.hpp"
#include "flashcute/core/forward_params.hpp"
#include "plan/checks.hpp"

namespace flashcute {

struct Call {
  Operand q, k, v;
  DType dtype;  // of all three
  CallOptions options;
  ForwardParams params;  // without outputs
  Device device;
  Arch arch;

  /// What lies in memory is not known here: it takes the band. A window that hides nothing before or after the diagonal
  /// is an easier mask.
  MaskKind mask() const {
    if (has_block_mask(options)) return MaskKind::mapped;
    if (has_lengths(options) || is_packed(options) || has_prefix(options) || options.sink != nullptr) {
      return MaskKind::band;
    }
    bool const window = has_window(options);
    if (window && params.window_offset > 1 - params.seqlen_q) return MaskKind::band;
    if (options.causal || (window && params.causal_offset < params.seqlen_k - 1)) return MaskKind::causal;
    return MaskKind::full;
  }
  bool on_gpu() const { return device.type == DeviceType::cuda; }
};

/// How many sequences are packed. Throws ArgumentError for what is no array of where they begin, or too many for
/// tensors of `rows` rows in all.
int32_t sequences_of(CallOptions const& options, int64_t rows);

/// Checks q, k, v and the options against each other. Throws ArgumentError, or DeviceError if their GPU cannot be used.
Call checked_call(TensorView const& q, TensorView const& k, TensorView const& v, CallOptions const& options);

/// Throws UnsupportedError, which says what to use instead, if no configuration can serve a dtype on `arch`;
/// DeviceError if the GPU is too old. `whose` starts the message: "q: " or "".
void require_kernel(DType dtype, Arch arch, std::string const& whose);

inline void require_kernel(Call const& call) { require_kernel(call.dtype, call.arch, "q: "); }

/// Throws ConfigError unless the configuration's dtype is that of the tensors and its compiled head dims are large
/// enough.
template <class Config>
void require_fits(Config const& config, Call const& call) {
  if (config.dtype != call.dtype) {
    throw ConfigError(std::string("cfg: dtype ") + name_of(config.dtype) + " does not fit the tensors' " +
                      name_of(call.dtype));
  }
  check_config(config, call.arch);
  auto const require = [](char const* option, int32_t compiled, int32_t d) {
    if (d <= compiled) return;
    throw ConfigError(std::string("cfg: ") + option + " " + std::to_string(compiled) +
                      " is smaller than the tensors' " + std::to_string(d));
  };
  require("head_dim", config.head_dim, call.params.head_dim);
  require("head_dim_v", config.head_dim_v, call.params.head_dim_v);
}

}  // namespace flashcute
