// The static configuration of a forward kernel. One plain value is the template argument of the
// kernel, the key of the image store, the kernel's name, and the `cfg` that a Python user passes.
#pragma once

#include "flashcute/kernel_id.hpp"

namespace flashcute {

/// How to compute: the options a user may choose. Each is static, so each can be switched and measured.
/// All but the first five are the GPU kernels' own.
struct ForwardConfig {
  using Pass = SinglePass;

  DType dtype = DType::bfloat16;
  int32_t head_dim = 128;         // of q and k: compiled width, runs any d up to it
  int32_t head_dim_v = head_dim;  // of v and the output: the same
  int32_t block_m = 128;          // B_r: query rows per tile
  int32_t block_n = 64;           // B_c: keys per K/V block
  int32_t num_warps = 4;          // each warp owns 16-row slices of the tile
  int32_t blocks_per_sm = 2;      // thread blocks that shall fit a multiprocessor: limits registers
  Math math = Math::tensor_core;  // mma.sync; three for one, for float32; fused multiply-adds on the CUDA cores
  int32_t stages = 1;             // K/V blocks in shared memory; 2: one arrives while the other is multiplied
  int32_t copy_bytes = 16;        // what a thread copies at once; addresses and strides must be multiples
  bool async_copy = true;         // global to shared memory by cp.async, not through registers
  bool eager_load_blocks = true;  // copy a K or V block as soon as its place is free, not when it is needed
  bool swizzled = true;           // XOR-swizzled shared memory: no bank conflicts
  bool q_in_registers = false;    // keep Q's fragments for the whole K/V loop
  int32_t k_tiles_per_load = 0;   // K-steps of K or V per fetch into registers; 0: pieces of 16 columns of one
  bool mma_double_buffer = true;  // fetch the next fragments while the tensor cores work on these
  bool optimized_softmax = true;  // one multiply-add and exp2 a score, one reduction of the row sum in the end
  int32_t rescale_threshold = 8;  // rescale a row once an exponential would exceed 2^this; 0: in every block
  bool pingpong = true;           // wgmma: warpgroups take turns in multiplying, softmax under each other's products
  bool overlap = true;            // wgmma: softmax of a block under the product P V of the block before
  bool stale_max = true;          // wgmma: exponentials do not wait for the maximum, and are checked afterwards
  bool scores_ahead = false;      // wgmma: the next block's scores are multiplied under this one's softmax too
  int32_t cluster = 1;            // wgmma: thread blocks that share K and V; 2: each loads half, for both

  constexpr bool operator==(ForwardConfig const&) const = default;
};

/// Calls f(name, member) for every option, in order: names, hashes, `replace` and the Python class are
/// written once from it.
template <class Config, class F>
constexpr void for_each_option(Config& c, F&& f) {
  f("dtype", c.dtype);
  f("head_dim", c.head_dim);
  f("head_dim_v", c.head_dim_v);
  f("block_m", c.block_m);
  f("block_n", c.block_n);
  f("num_warps", c.num_warps);
  f("blocks_per_sm", c.blocks_per_sm);
  f("math", c.math);
  f("stages", c.stages);
  f("copy_bytes", c.copy_bytes);
  f("async_copy", c.async_copy);
  f("eager_load_blocks", c.eager_load_blocks);
  f("swizzled", c.swizzled);
  f("q_in_registers", c.q_in_registers);
  f("k_tiles_per_load", c.k_tiles_per_load);
  f("mma_double_buffer", c.mma_double_buffer);
  f("optimized_softmax", c.optimized_softmax);
  f("rescale_threshold", c.rescale_threshold);
  f("pingpong", c.pingpong);
  f("overlap", c.overlap);
  f("stale_max", c.stale_max);
  f("scores_ahead", c.scores_ahead);
  f("cluster", c.cluster);
}

using ForwardKernelId = KernelId<ForwardConfig>;

/// The kernel of a call: the forward has no other.
constexpr ForwardKernelId kernel_of(ForwardConfig const& config, Features const& features) {
  return kernel_of(config, SinglePass::forward, features);
}

/// Canonical name of a configuration: "fwd_bf16_d128_m64_n64_w4" and a word for every option that differs
/// from the defaults.
constexpr Name name(ForwardConfig const& c) {
  Name s;
  s << "fwd_" << word_of(c.dtype) << "_d" << c.head_dim;
  if (c.head_dim_v != c.head_dim) s << "_dv" << c.head_dim_v;
  s << "_m" << c.block_m << "_n" << c.block_n << "_w" << c.num_warps;
  if (c.blocks_per_sm != 2) s << "_b" << c.blocks_per_sm;
  s.add_word(word_of(c.math));
  if (c.stages != 1) s << "_st" << c.stages;
  if (c.copy_bytes != 16) s << "_copy" << c.copy_bytes;
  if (!c.async_copy) s << "_sync";
  if (!c.eager_load_blocks) s << "_lazy";
  if (!c.swizzled) s << "_unswizzled";
  if (c.q_in_registers) s << "_qreg";
  if (c.k_tiles_per_load != 0) s << "_k" << c.k_tiles_per_load;
  if (!c.mma_double_buffer) s << "_single";
  if (!c.optimized_softmax) s << "_textbook";
  if (c.rescale_threshold != 8) s << "_tau" << c.rescale_threshold;
  if (!c.pingpong) s << "_noturns";
  if (!c.overlap) s << "_serial";
  if (!c.stale_max) s << "_freshmax";
  if (c.scores_ahead) s << "_ahead";
  if (c.cluster != 1) s << "_cluster" << c.cluster;
  return s;
}

// ---- resources and rules -------------------------------------------------------------------------

/// Where a configuration is to run: 0 is the CPU backend, otherwise a GPU's compute capability * 10.
using Arch = int32_t;
inline constexpr Arch cpu_arch = 0;

/// Threads that a multiprocessor holds at once.
constexpr int32_t max_threads_per_sm(Arch arch) {
  switch (arch) {
    case 86:
    case 87:
    case 89:
    case 120:
    case 121: return 1536;
    default: return 2048;
  }
}

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

/// Shared memory of a multiprocessor, in bytes, of which CUDA keeps some for itself with each thread block.
constexpr int32_t max_smem_bytes_per_sm(Arch arch) { return max_smem_bytes(arch) + 1024; }
inline constexpr int32_t reserved_smem_bytes = 1024;

// Hopper's kernel computes with warpgroups of four warps and 64 query rows each, and loads with one more.
inline constexpr int32_t warpgroup_rows = 64;
constexpr int32_t consumer_warpgroups(ForwardConfig const& c) { return c.num_warps / 4; }

/// Query rows that share the blocks of keys that are loaded for them.
constexpr int32_t tile_rows(ForwardConfig const& c) { return c.block_m * c.cluster; }

/// Keys of a block that one thread block of a cluster loads.
constexpr int32_t keys_per_load(ForwardConfig const& c) { return c.block_n / c.cluster; }

constexpr int32_t num_threads(ForwardConfig const& c) { return 32 * c.num_warps + (c.math == Math::wgmma ? 128 : 0); }

/// Registers of a thread of the warpgroup that loads, and of those that compute: of the 65536 of a multiprocessor.
struct WarpgroupRegisters {
  int32_t loader, consumer;
};
constexpr WarpgroupRegisters registers_of(ForwardConfig const& c) {
  if (consumer_warpgroups(c) == 3) return {32, 160};
  return c.head_dim_v > 128 ? WarpgroupRegisters{24, 240} : WarpgroupRegisters{40, 232};
}

/// How a tile of `width` columns lies in shared memory and is copied there. Its rows are cut into chunks of
/// at most 128 bytes, all 32 banks; neighbouring threads copy neighbouring pieces of a chunk's row.
struct CopyShape {
  int32_t chunk;            // columns of a chunk
  int32_t vector;           // columns that a thread copies at once
  int32_t threads_per_row;  // that copy one row of a chunk
  int32_t rows_per_pass;    // rows that all threads together copy at once

  static constexpr CopyShape of(ForwardConfig const& c, int32_t width) {
    CopyShape s{};
    int32_t const size = size_of(c.dtype);
    for (s.chunk = 128 / size; width % s.chunk != 0;) s.chunk /= 2;
    s.vector = c.copy_bytes / size;
    s.threads_per_row = min_of<int32_t>(32, s.chunk / s.vector);
    s.rows_per_pass = num_threads(c) / s.threads_per_row;
    return s;
  }
};

/// How many rounds of tiles Hopper's kernel takes heads for at once, and in the end: their K and V shall stay in the L2
/// cache (132 tiles of 128 rows have 9 MB at head_dim 128), but to the end there must be short tiles for those who have
/// less to do so far.
struct SectionRounds {
  int32_t usual, last;

  constexpr bool operator==(SectionRounds const&) const = default;
};
inline constexpr SectionRounds equally_long{0, 0};  // tiles, which then go by heads
constexpr SectionRounds section_rounds(ForwardKernelId const& k) {
  switch (k.features.mask) {
    case MaskKind::full: return equally_long;
    case MaskKind::causal: return {1, k.config.head_dim > 128 ? 2 : 4};
  }
  return equally_long;
}

/// For the barriers of Hopper's kernel.
inline constexpr int32_t barrier_bytes = 1024;

/// Dynamic shared memory of the kernel: one Q tile, and `stages` blocks each of K and V. The output tile
/// reuses Q's place.
constexpr int64_t smem_bytes(ForwardConfig const& c) {
  int64_t const m = c.block_m, n = c.block_n, d = c.head_dim, d_v = c.head_dim_v;
  if (c.math == Math::wgmma) return (m * d + c.stages * n * (d + d_v)) * size_of(c.dtype) + barrier_bytes;
  return (m * max_of(d, d_v) + c.stages * n * (d + d_v)) * size_of(c.dtype);
}

// Every rule: an identifier and the sentence that C++, Python and static_assert all show.
#define FLASHCUTE_FORWARD_CONFIG_RULES(RULE)                                                                           \
  RULE(arch_too_old, "the mma.sync kernels need a GPU of compute capability 8.0 or later")                             \
  RULE(gpu_dtype, "dtype must be float16, bfloat16 or float32 on a GPU")                                               \
  RULE(gpu_head_dim, "head_dim and head_dim_v must be multiples of 16 between 16 and 256 on a GPU")                    \
  RULE(cpu_dtype, "dtype must be float16, bfloat16, float32 or float64")                                               \
  RULE(cpu_head_dim, "head_dim and head_dim_v must be between 1 and 256 on the CPU")                                   \
  RULE(num_warps, "num_warps must be 1, 2, 4 or 8")                                                                    \
  RULE(block_m, "block_m must be a positive multiple of 16 * num_warps, at most 256")                                  \
  RULE(block_n, "block_n must be a positive multiple of 16, at most 256")                                              \
  RULE(blocks_per_sm, "blocks_per_sm must be between 1 and 16, and their threads must fit a multiprocessor")           \
  RULE(stages, "stages must be 1, or 2, which needs eager_load_blocks")                                                \
  RULE(copy_bytes, "copy_bytes must be 16, 8, 4 or 2, and at least the bytes of an element")                           \
  RULE(async_copy, "async_copy needs copy_bytes of 4 or more: cp.async cannot copy less")                              \
  RULE(copy_rows, "block_m and block_n must be multiples of the rows that all threads copy at once")                   \
  RULE(tf32x3, "math = tf32x3 needs dtype float32")                                                                    \
  RULE(fragments, "q_in_registers and k_tiles_per_load need math = tensor_core")                                       \
  RULE(k_tiles_per_load, "k_tiles_per_load must be 0, 1 or 2, and 2 needs head_dim and block_n to be multiples of 32") \
  RULE(rescale_threshold, "rescale_threshold must be between 0 and 8")                                                 \
  RULE(wgmma_arch, "math = wgmma needs a GPU of compute capability 9.0: it is Hopper's kernel")                        \
  RULE(wgmma_dtype, "math = wgmma needs dtype float16 or bfloat16")                                                    \
  RULE(wgmma_head_dim, "math = wgmma needs head_dim and head_dim_v to be 64, 128, 192 or 256")                         \
  RULE(wgmma_block_m, "math = wgmma needs block_m of 64, 128 or 192 and num_warps = block_m / 16")                     \
  RULE(wgmma_stages, "math = wgmma needs stages between 2 and 8")                                                      \
  RULE(wgmma_options, "math = wgmma needs blocks_per_sm = 1 and defaults from copy_bytes to mma_double_buffer")        \
  RULE(wgmma_cluster, "cluster must be 1 or 2")                                                                        \
  RULE(wgmma_only, "pingpong, overlap, stale_max, scores_ahead and cluster need math = wgmma")                         \
  RULE(stale_max, "stale_max needs overlap, optimized_softmax and a rescale_threshold above 0")                        \
  RULE(scores_ahead, "scores_ahead needs stale_max")                                                                   \
  RULE(smem, "block_m, block_n, stages and head_dim need more shared memory than a thread block of this GPU can have")

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

/// The first rule of Hopper's kernel that `c` breaks on `arch`.
constexpr ForwardConfigError check_wgmma(ForwardConfig const& c, Arch arch) {
  using enum ForwardConfigError;
  if (arch != 90) return wgmma_arch;
  if (c.dtype != DType::float16 && c.dtype != DType::bfloat16) return wgmma_dtype;
  int32_t const widths[] = {c.head_dim, c.head_dim_v};
  for (int32_t const d : widths) {
    if (d < 64 || d > 256 || d % 64 != 0) return wgmma_head_dim;
  }
  if (c.block_m < 64 || c.block_m > 192 || c.block_m % 64 != 0 || c.num_warps != c.block_m / 16) return wgmma_block_m;
  if (c.block_n <= 0 || c.block_n > 256 || c.block_n % 16 != 0) return block_n;
  if (c.stages < 2 || c.stages > 8) return wgmma_stages;
  if (c.cluster != 1 && c.cluster != 2) return wgmma_cluster;
  if (c.rescale_threshold < 0 || c.rescale_threshold > 8) return rescale_threshold;
  if (c.stale_max && (!c.overlap || !c.optimized_softmax || c.rescale_threshold == 0)) return stale_max;
  if (c.scores_ahead && !c.stale_max) return scores_ahead;
  ForwardConfig const d;
  if (c.blocks_per_sm != 1 || c.copy_bytes != d.copy_bytes || c.async_copy != d.async_copy ||
      c.eager_load_blocks != d.eager_load_blocks || c.swizzled != d.swizzled || c.q_in_registers != d.q_in_registers ||
      c.k_tiles_per_load != d.k_tiles_per_load || c.mma_double_buffer != d.mma_double_buffer) {
    return wgmma_options;
  }
  if (smem_bytes(c) > max_smem_bytes(arch)) return smem;
  return none;
}

/// The first rule that `c` breaks on `arch`.
constexpr ForwardConfigError check(ForwardConfig const& c, Arch arch) {
  using enum ForwardConfigError;
  if (c.math == Math::wgmma) return check_wgmma(c, arch);
  if (!c.pingpong || !c.overlap || !c.stale_max || c.scores_ahead || c.cluster != 1) return wgmma_only;
  if (c.num_warps != 1 && c.num_warps != 2 && c.num_warps != 4 && c.num_warps != 8) return num_warps;
  if (c.block_m <= 0 || c.block_m > 256 || c.block_m % (16 * c.num_warps) != 0) return block_m;
  if (c.block_n <= 0 || c.block_n > 256 || c.block_n % 16 != 0) return block_n;
  if (c.blocks_per_sm < 1 || c.blocks_per_sm > 16) return blocks_per_sm;
  if (c.blocks_per_sm * num_threads(c) > max_threads_per_sm(arch)) return blocks_per_sm;
  if (c.stages != 1 && (c.stages != 2 || !c.eager_load_blocks)) return stages;
  if (c.rescale_threshold < 0 || c.rescale_threshold > 8) return rescale_threshold;
  if (c.copy_bytes != 16 && c.copy_bytes != 8 && c.copy_bytes != 4 && c.copy_bytes != 2) return copy_bytes;
  int32_t const widths[] = {c.head_dim, c.head_dim_v};
  for (int32_t const d : widths) {
    if (arch == cpu_arch && (d < 1 || d > 256)) return cpu_head_dim;
  }
  if (c.dtype == DType::int32) return cpu_dtype;
  if (arch == cpu_arch) return none;
  if (arch < 80) return arch_too_old;
  if (c.dtype == DType::float64) return gpu_dtype;
  if (c.copy_bytes < size_of(c.dtype)) return copy_bytes;
  if (c.async_copy && c.copy_bytes < 4) return async_copy;
  for (int32_t const d : widths) {
    if (d < 16 || d > 256 || d % 16 != 0) return gpu_head_dim;
    int32_t const rows = CopyShape::of(c, d).rows_per_pass;
    if (c.block_m % rows != 0 || c.block_n % rows != 0) return copy_rows;
  }
  if (c.math == Math::tf32x3 && c.dtype != DType::float32) return tf32x3;
  if (c.math != Math::tensor_core && (c.q_in_registers || c.k_tiles_per_load != 0)) return fragments;
  if (c.k_tiles_per_load < 0 || c.k_tiles_per_load > 2) return k_tiles_per_load;
  if (c.k_tiles_per_load == 2 && (c.head_dim % 32 != 0 || c.block_n % 32 != 0)) return k_tiles_per_load;
  if (smem_bytes(c) > max_smem_bytes(arch)) return smem;
  return none;
}

}  // namespace flashcute
