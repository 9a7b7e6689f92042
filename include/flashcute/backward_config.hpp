// The static configuration of a backward kernel: as config.hpp for the forward.
#pragma once

#include "flashcute/config.hpp"

namespace flashcute {

/// The backward takes two passes. What a pass computes:
enum class BackwardPass : uint8_t {
  queries,  // delta and dQ of a tile of query rows, past which the keys go
  keys,     // dK and dV of a tile of keys, past which the queries go
};

/// How to compute gradients: the options a user may choose.
struct BackwardConfig {
  DType dtype = DType::bfloat16;
  int32_t head_dim = 128;         // of q and k: compiled width, runs any d up to it
  int32_t head_dim_v = head_dim;  // of v and the output: the same
  int32_t block_m = 64;           // B_r: query rows per tile
  int32_t block_n = 64;           // B_c: keys per block
  bool deterministic = false;     // the same bits in every run; the CPU backend always gives them

  constexpr bool operator==(BackwardConfig const&) const = default;
};

/// Calls f(name, member) for every option, in order.
template <class Config, class F>
  requires std_::is_same_v<std_::remove_const_t<Config>, BackwardConfig>
constexpr void for_each_option(Config& c, F&& f) {
  f("dtype", c.dtype);
  f("head_dim", c.head_dim);
  f("head_dim_v", c.head_dim_v);
  f("block_m", c.block_m);
  f("block_n", c.block_n);
  f("deterministic", c.deterministic);
}

/// Canonical name: "bwd_f32_d64_m64_n64" and a word for every option that differs from the defaults.
constexpr Name name(BackwardConfig const& c) {
  Name s;
  s << "bwd_" << short_name_of(c.dtype) << "_d" << c.head_dim;
  if (c.head_dim_v != c.head_dim) s << "_dv" << c.head_dim_v;
  s << "_m" << c.block_m << "_n" << c.block_n;
  if (c.deterministic) s << "_deterministic";
  return s;
}

// Every rule: an identifier and the sentence that C++ and Python show.
#define FLASHCUTE_BACKWARD_CONFIG_RULES(RULE)                                 \
  RULE(gpu, "there is no GPU kernel of the backward yet: it runs on the CPU") \
  RULE(dtype, "dtype must be float16, bfloat16, float32 or float64")          \
  RULE(head_dim, "head_dim and head_dim_v must be between 1 and 256")         \
  RULE(block_m, "block_m must be a positive multiple of 16, at most 256")     \
  RULE(block_n, "block_n must be a positive multiple of 16, at most 256")

enum class BackwardConfigError : uint8_t {
  none,
#define FLASHCUTE_RULE(id, sentence) id,
  FLASHCUTE_BACKWARD_CONFIG_RULES(FLASHCUTE_RULE)
#undef FLASHCUTE_RULE
};

constexpr char const* sentence(BackwardConfigError e) {
  switch (e) {
    case BackwardConfigError::none: return "";
#define FLASHCUTE_RULE(id, text) \
  case BackwardConfigError::id: return text;
      FLASHCUTE_BACKWARD_CONFIG_RULES(FLASHCUTE_RULE)
#undef FLASHCUTE_RULE
  }
  return "?";
}

/// The first rule that `c` breaks on `arch`.
constexpr BackwardConfigError check(BackwardConfig const& c, Arch arch) {
  using enum BackwardConfigError;
  if (c.dtype == DType::int32) return dtype;
  if (c.head_dim < 1 || c.head_dim > 256 || c.head_dim_v < 1 || c.head_dim_v > 256) return head_dim;
  if (c.block_m <= 0 || c.block_m > 256 || c.block_m % 16 != 0) return block_m;
  if (c.block_n <= 0 || c.block_n > 256 || c.block_n % 16 != 0) return block_n;
  return arch == cpu_arch ? none : gpu;
}

/// The configuration of the CPU backend: a tile and a block that fit the level 2 cache at every head dim.
constexpr BackwardConfig cpu_backward_config(DType dtype, int32_t head_dim, int32_t head_dim_v) {
  return {.dtype = dtype, .head_dim = head_dim, .head_dim_v = head_dim_v, .block_m = 64, .block_n = 64};
}

}  // namespace flashcute
