// The static configuration of a forward kernel. One plain value is the template argument of the
// kernel, the key of the image store, the kernel's name, and the `cfg` that a Python user passes.
#pragma once

#include "flashcute/std.hpp"

namespace flashcute {

enum class DType : uint8_t { float16, bfloat16, float32, float64 };
enum class MaskKind : uint8_t { full, causal };

constexpr int32_t size_of(DType t) { return t == DType::float64 ? 8 : t == DType::float32 ? 4 : 2; }

constexpr char const* name_of(DType t) {
  switch (t) {
    case DType::float16: return "float16";
    case DType::bfloat16: return "bfloat16";
    case DType::float32: return "float32";
    case DType::float64: return "float64";
  }
  return "?";
}

constexpr char const* short_name_of(DType t) {
  switch (t) {
    case DType::float16: return "f16";
    case DType::bfloat16: return "bf16";
    case DType::float32: return "f32";
    case DType::float64: return "f64";
  }
  return "?";
}

constexpr char const* name_of(MaskKind m) { return m == MaskKind::causal ? "causal" : "full"; }

/// How to compute: the options a user may choose. Each is static, so each can be switched and measured.
struct ForwardConfig {
  DType dtype = DType::bfloat16;
  int32_t head_dim = 128;       // compiled width; any d up to it runs (on a GPU a multiple of 8)
  int32_t block_m = 128;        // B_r: query rows per tile
  int32_t block_n = 64;         // B_c: keys per K/V block
  int32_t num_warps = 4;        // each warp owns 16-row slices of the tile        (GPU only)
  bool swizzled = true;         // XOR-swizzled shared memory: no bank conflicts   (GPU only)
  bool q_in_registers = false;  // keep Q's fragments for the whole K/V loop       (GPU only)

  constexpr bool operator==(ForwardConfig const&) const = default;
};

/// Calls f(name, member) for every option, in order: names, hashes, `replace` and the Python class are
/// written once from it.
template <class Config, class F>
constexpr void for_each_option(Config& c, F&& f) {
  f("dtype", c.dtype);
  f("head_dim", c.head_dim);
  f("block_m", c.block_m);
  f("block_n", c.block_n);
  f("num_warps", c.num_warps);
  f("swizzled", c.swizzled);
  f("q_in_registers", c.q_in_registers);
}

/// What to compute, as far as it changes the code: taken from the arguments of a call, not chosen.
struct Features {
  MaskKind mask = MaskKind::full;

  constexpr bool operator==(Features const&) const = default;
};

/// One kernel: how and what.
struct ForwardKernelId {
  ForwardConfig config;
  Features features;

  constexpr bool operator==(ForwardKernelId const&) const = default;
};

// ---- names ---------------------------------------------------------------------------------------

/// A short string that constant expressions can build.
struct Name {
  char text[112] = {};
  int32_t length = 0;

  constexpr Name& operator<<(char const* s) {
    while (*s != '\0') text[length++] = *s++;
    return *this;
  }
  constexpr Name& operator<<(int32_t value) {
    if (value < 0) *this << "-";  // in messages about an invalid configuration
    auto rest = value < 0 ? -static_cast<int64_t>(value) : static_cast<int64_t>(value);
    char digits[12] = {};
    int32_t n = 0;
    do {
      digits[n++] = static_cast<char>('0' + rest % 10);
      rest /= 10;
    } while (rest > 0);
    while (n > 0) text[length++] = digits[--n];
    return *this;
  }
};

/// Canonical name of a configuration, for example "fwd_bf16_d128_m64_n64_w4_swizzled".
constexpr Name name(ForwardConfig const& c) {
  Name s;
  s << "fwd_" << short_name_of(c.dtype) << "_d" << c.head_dim << "_m" << c.block_m << "_n" << c.block_n << "_w"
    << c.num_warps;
  if (c.swizzled) s << "_swizzled";
  if (c.q_in_registers) s << "_qreg";
  return s;
}

/// Name of the GPU kernel, which is also its entry point: "flashcute_sm80_fwd_..._causal".
constexpr Name name(ForwardKernelId const& k) {
  Name s;
  s << "flashcute_sm80_" << name(k.config).text << "_" << name_of(k.features.mask);
  return s;
}

// ---- resources and rules -------------------------------------------------------------------------

/// Where a configuration is to run: 0 is the CPU backend, otherwise a GPU's compute capability * 10.
using Arch = int32_t;
inline constexpr Arch cpu_arch = 0;

/// Shared memory that one thread block may have, in bytes.
constexpr int32_t max_smem_bytes(Arch arch) {
  switch (arch) {
    case 80:
    case 87: return 163 * 1024;
    case 86:
    case 89:
    case 120:
    case 121: return 99 * 1024;
    default: return 227 * 1024;
  }
}

constexpr int32_t num_threads(ForwardConfig const& c) { return 32 * c.num_warps; }

/// Dynamic shared memory of the kernel: one Q tile and one block each of K and V. The output tile
/// reuses Q's place.
constexpr int32_t smem_bytes(ForwardConfig const& c) {
  return (c.block_m + 2 * c.block_n) * c.head_dim * size_of(c.dtype);
}

// Every rule: an identifier and the sentence that C++, Python and static_assert all show.
#define FLASHCUTE_FORWARD_CONFIG_RULES(RULE)                                                   \
  RULE(arch_too_old, "the mma.sync kernels need a GPU of compute capability 8.0 or later")     \
  RULE(gpu_dtype, "dtype must be float16 or bfloat16 on a GPU")                                \
  RULE(gpu_head_dim, "head_dim must be 64 or 128 on a GPU")                                    \
  RULE(cpu_head_dim, "head_dim must be between 1 and 256 on the CPU")                          \
  RULE(num_warps, "num_warps must be 1, 2, 4 or 8")                                            \
  RULE(block_m, "block_m must be a positive multiple of 16 * num_warps, at most 256")          \
  RULE(block_n, "block_n must be a positive multiple of 16 and of 4 * num_warps, at most 256") \
  RULE(smem, "block_m, block_n and head_dim need more shared memory than a thread block of this GPU can have")

enum class ForwardConfigError : uint8_t {
  none,
#define FLASHCUTE_RULE(id, sentence) id,
  FLASHCUTE_FORWARD_CONFIG_RULES(FLASHCUTE_RULE)
#undef FLASHCUTE_RULE
};

constexpr char const* sentence(ForwardConfigError e) {
  switch (e) {
    case ForwardConfigError::none: return "";
#define FLASHCUTE_RULE(id, text) \
  case ForwardConfigError::id: return text;
      FLASHCUTE_FORWARD_CONFIG_RULES(FLASHCUTE_RULE)
#undef FLASHCUTE_RULE
  }
  return "?";
}

/// The first rule that `c` breaks on `arch`.
constexpr ForwardConfigError check(ForwardConfig const& c, Arch arch) {
  using enum ForwardConfigError;
  if (c.num_warps != 1 && c.num_warps != 2 && c.num_warps != 4 && c.num_warps != 8) return num_warps;
  if (c.block_m <= 0 || c.block_m > 256 || c.block_m % (16 * c.num_warps) != 0) return block_m;
  // A pass of the global-to-shared copy covers 4 * num_warps rows (8 threads a row).
  if (c.block_n <= 0 || c.block_n > 256 || c.block_n % 16 != 0 || c.block_n % (4 * c.num_warps) != 0) return block_n;
  if (arch == cpu_arch) return c.head_dim < 1 || c.head_dim > 256 ? cpu_head_dim : none;
  if (arch < 80) return arch_too_old;
  if (c.dtype != DType::float16 && c.dtype != DType::bfloat16) return gpu_dtype;
  if (c.head_dim != 64 && c.head_dim != 128) return gpu_head_dim;
  if (smem_bytes(c) > max_smem_bytes(arch)) return smem;
  return none;
}

/// The default configuration for head dimension d on `arch`. The GPU tiles stay under the 99 KB of
/// shared memory that compute capabilities 8.6, 8.9 and 12.0 allow, so one choice serves all; none
/// spills in its main loop on any target (see docs/decisions/0003-tiles.md).
constexpr ForwardConfig default_forward_config(DType dtype, int32_t d, Arch arch) {
  ForwardConfig c;
  c.dtype = dtype;
  if (arch == cpu_arch) {
    c.head_dim = d;
    c.block_m = 64;
    c.block_n = 128;
  } else if (d <= 64) {
    c.head_dim = 64;
    c.block_m = 128;
    c.block_n = 64;
  } else {
    c.head_dim = 128;
    c.block_m = 64;
    c.block_n = 64;
  }
  return c;
}

}  // namespace flashcute
