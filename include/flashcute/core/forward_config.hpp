// The static configuration of a forward kernel. One plain value is the template argument of the
// kernel, the key of the image store, the kernel's name, and the `cfg` that a Python user passes.
#pragma once

#include "flashcute/core/arch.hpp"
#include "flashcute/core/kernel_id.hpp"
#include "flashcute/core/tile_config.hpp"

namespace flashcute {

/// How to compute: the options a user may choose. Each is static, so each can be switched and measured.
/// The first five are all that the CPU reads.
struct ForwardConfig {
  using Pass = SinglePass;

  DType dtype = DType::bfloat16;
  int32_t head_dim = 128;         // of q and k: compiled width, runs any d up to it
  int32_t head_dim_v = head_dim;  // of v and the output: the same
  int32_t block_m = 128;          // B_r: query rows per tile
  int32_t block_n = 64;           // B_c: keys per K/V block
  int32_t num_warps = 4;          // that compute: each owns 16-row slices of the tile
  Kernel kernel = Kernel::sm80;   // for every GPU, or Hopper's own
  int32_t blocks_per_sm = 2;      // sm80: thread blocks that must fit a multiprocessor: limits registers
  Math math = Math::tensor_core;  // how to multiply: tensor cores, three TF32 products for float32, CUDA cores
  int32_t stages = 1;             // K/V blocks in shared memory; 2: one arrives while the other is multiplied
  int32_t copy_bytes = 16;        // sm80: what a thread copies at once; addresses and strides must be multiples
  bool async_copy = true;         // sm80: global to shared memory by cp.async, not through registers
  bool eager_load_blocks = true;  // sm80: copy a K or V block as soon as its buffer is free, not when it is needed
  bool swizzled = true;           // sm80: XOR-swizzled shared memory: no bank conflicts
  bool q_in_registers = false;    // sm80: keep Q's fragments for the whole K/V loop
  int32_t k_tiles_per_load = 0;   // sm80: K-steps of K or V per fetch into registers; 0: 16 columns of one K-step
  bool mma_double_buffer = true;  // sm80: fetch the next fragments while the tensor cores work on these
  bool optimized_softmax = true;  // one multiply-add and exp2 per score, one reduction of the row sum at the end
  int32_t rescale_threshold = 8;  // rescale a row once an exponential would exceed 2^this; 0: in every block
  bool pingpong = true;           // sm90: warpgroups take turns: one's softmax overlaps another's products
  bool overlap = true;            // sm90: the softmax of a block overlaps the product P V of the block before
  bool stale_max = true;          // sm90: exponentials use the maximum so far, and are checked afterwards
  bool scores_ahead = false;      // sm90: the softmax of a block overlaps the product S of the next one too
  bool late_store = false;        // sm90: a tile's output is written during the second product S of the next tile
  int32_t cluster = 1;            // sm90: thread blocks that share K and V; 2: each loads half, for both

  constexpr bool operator==(ForwardConfig const&) const = default;

  /// The table of the options.
  template <class Visit>
  static constexpr void for_each_member(Visit&& visit) {
    using C = ForwardConfig;
    using enum ReadBy;
    visit(Option{"dtype", all, nullptr}, &C::dtype);
    visit(Option{"head_dim", all, nullptr}, &C::head_dim);
    visit(Option{"head_dim_v", all, nullptr}, &C::head_dim_v);
    visit(Option{"block_m", all, nullptr}, &C::block_m);
    visit(Option{"block_n", all, nullptr}, &C::block_n);
    visit(Option{"num_warps", all, nullptr}, &C::num_warps);
    visit(Option{"kernel", all}, &C::kernel);
    visit(Option{"blocks_per_sm", sm80, "b"}, &C::blocks_per_sm);
    visit(Option{"math", all}, &C::math);
    visit(Option{"stages", all, "st"}, &C::stages);
    visit(Option{"copy_bytes", sm80, "copy"}, &C::copy_bytes);
    visit(Option{"async_copy", sm80, "sync"}, &C::async_copy);
    visit(Option{"eager_load_blocks", sm80, "lazy"}, &C::eager_load_blocks);
    visit(Option{"swizzled", sm80, "unswizzled"}, &C::swizzled);
    visit(Option{"q_in_registers", sm80, "qreg"}, &C::q_in_registers);
    visit(Option{"k_tiles_per_load", sm80, "k"}, &C::k_tiles_per_load);
    visit(Option{"mma_double_buffer", sm80, "single"}, &C::mma_double_buffer);
    visit(Option{"optimized_softmax", all, "textbook"}, &C::optimized_softmax);
    visit(Option{"rescale_threshold", all, "tau"}, &C::rescale_threshold);
    visit(Option{"pingpong", sm90, "noturns"}, &C::pingpong);
    visit(Option{"overlap", sm90, "serial"}, &C::overlap);
    visit(Option{"stale_max", sm90, "freshmax"}, &C::stale_max);
    visit(Option{"scores_ahead", sm90, "ahead"}, &C::scores_ahead);
    visit(Option{"late_store", sm90, "latestore"}, &C::late_store);
    visit(Option{"cluster", sm90, "cluster"}, &C::cluster);
  }
};

using ForwardKernelId = KernelId<ForwardConfig>;

/// The kernel of a call: the forward has one pass.
constexpr ForwardKernelId kernel_of(ForwardConfig const& config, Features const& features) {
  return kernel_of(config, SinglePass::forward, features);
}

/// Canonical name of a configuration: "fwd_bf16_d128_m64_n64_w4" and a word for every option that differs
/// from the defaults.
constexpr Name name(ForwardConfig const& c) { return option_words("fwd", c); }

// ---- resources and rules -------------------------------------------------------------------------

// Hopper's kernel computes with warpgroups of four warps, each of which owns 64 query rows; one more warpgroup loads.
inline constexpr int32_t warpgroup_rows = 64;
constexpr int32_t consumer_warpgroups(ForwardConfig const& c) { return c.num_warps / 4; }

/// Query rows of a tile: those of all thread blocks of a cluster, which share the blocks of keys.
constexpr int32_t tile_rows(ForwardConfig const& c) { return c.block_m * c.cluster; }

/// Keys of a block that one thread block of a cluster loads.
constexpr int32_t keys_per_load(ForwardConfig const& c) { return c.block_n / c.cluster; }

constexpr int32_t num_threads(ForwardConfig const& c) {
  return 32 * c.num_warps + (c.kernel == Kernel::sm90 ? 128 : 0);
}

/// The tile of the sm80 kernel.
constexpr TileConfig tile_of(ForwardConfig const& c) { return tile_with_rows(c, c.block_m, c.block_n); }

/// Shared memory of Hopper's kernel beside the tiles, which begin at multiples of 1024 bytes: mbarriers and what the
/// loading warp announces, of the mask with the largest ranges.
inline constexpr int32_t control_bytes = 2048;

/// Dynamic shared memory of the kernel: one Q tile, and `stages` blocks each of K and V. In the sm80 kernel the output
/// tile reuses the memory of Q.
constexpr int64_t smem_bytes(ForwardConfig const& c) {
  int64_t const m = c.block_m, n = c.block_n, d = c.head_dim, d_v = c.head_dim_v;
  if (c.kernel == Kernel::sm90) return (m * d + c.stages * n * (d + d_v)) * size_of(c.dtype) + control_bytes;
  return (m * max_of(d, d_v) + c.stages * n * (d + d_v)) * size_of(c.dtype);
}

// Every rule: an identifier and the sentence that C++, Python and static_assert all show.
#define FLASHCUTE_FORWARD_CONFIG_RULES(RULE)                                                                           \
  RULE(cpu_head_dim, "head_dim and head_dim_v must be between 1 and 256 on the CPU")                                   \
  RULE(cpu_block_m, "block_m must be a positive multiple of 16, at most 256, on the CPU")                              \
  RULE(block_n, "block_n must be a positive multiple of 16, at most 256")                                              \
  RULE(other_kernel, "an option that only another kernel reads must have its default value")                           \
  RULE(rescale_threshold, "rescale_threshold must be between 0 and 8")                                                 \
  RULE(arch_too_old, "the sm80 kernels need a GPU of compute capability 8.0 or later")                                 \
  RULE(gpu_dtype, "dtype must be float16, bfloat16 or float32 on a GPU")                                               \
  RULE(gpu_head_dim, "head_dim and head_dim_v must be multiples of 16 between 16 and 256 on a GPU")                    \
  RULE(num_warps, "num_warps must be 1, 2, 4 or 8")                                                                    \
  RULE(block_m, "block_m must be a positive multiple of 16 * num_warps, at most 256")                                  \
  RULE(blocks_per_sm, "blocks_per_sm must be between 1 and 16, and their threads must fit a multiprocessor")           \
  RULE(stages, "stages must be 1, or 2, which needs eager_load_blocks")                                                \
  RULE(copy_bytes, "copy_bytes must be 16, 8, 4 or 2, and at least the bytes of an element")                           \
  RULE(async_copy, "async_copy needs copy_bytes of 4 or more: cp.async cannot copy less")                              \
  RULE(copy_rows, "block_m and block_n must be multiples of the rows that all threads copy at once")                   \
  RULE(tf32x3, "math = tf32x3 needs dtype float32")                                                                    \
  RULE(fragments, "q_in_registers and k_tiles_per_load need math = tensor_core")                                       \
  RULE(k_tiles_per_load, "k_tiles_per_load must be 0, 1 or 2, and 2 needs head_dim and block_n to be multiples of 32") \
  RULE(sm90_arch, "kernel = sm90 needs a GPU of compute capability 9.0: it is Hopper's")                               \
  RULE(sm90_dtype, "kernel = sm90 needs dtype float16 or bfloat16")                                                    \
  RULE(sm90_math, "kernel = sm90 needs math = tensor_core")                                                            \
  RULE(sm90_head_dim, "kernel = sm90 needs head_dim and head_dim_v to be multiples of 32 between 64 and 256")          \
  RULE(sm90_block_m, "kernel = sm90 needs block_m of 64, 128 or 192 and num_warps = block_m / 16")                     \
  RULE(sm90_stages, "kernel = sm90 needs stages between 2 and 8")                                                      \
  RULE(cluster, "cluster must be 1 or 2")                                                                              \
  RULE(stale_max, "stale_max needs overlap, optimized_softmax and a rescale_threshold above 0")                        \
  RULE(scores_ahead, "scores_ahead needs stale_max")                                                                   \
  RULE(late_store, "late_store needs overlap")                                                                         \
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

/// The first rule of the CPU backend that `c` breaks.
constexpr ForwardConfigError check_cpu(ForwardConfig const& c) {
  using enum ForwardConfigError;
  int32_t const widths[] = {c.head_dim, c.head_dim_v};
  for (int32_t const d : widths) {
    if (d < 1 || d > 256) return cpu_head_dim;
  }
  if (c.block_m <= 0 || c.block_m > 256 || c.block_m % 16 != 0) return cpu_block_m;
  return none;
}

/// The first rule of the sm80 kernel that `c` breaks on `arch`.
constexpr ForwardConfigError check_sm80(ForwardConfig const& c, Arch arch) {
  using enum ForwardConfigError;
  if (c.num_warps != 1 && c.num_warps != 2 && c.num_warps != 4 && c.num_warps != 8) return num_warps;
  if (c.block_m <= 0 || c.block_m > 256 || c.block_m % (16 * c.num_warps) != 0) return block_m;
  if (c.blocks_per_sm < 1 || c.blocks_per_sm > 16) return blocks_per_sm;
  if (c.blocks_per_sm * num_threads(c) > max_threads_per_sm(arch)) return blocks_per_sm;
  if (c.stages != 1 && (c.stages != 2 || !c.eager_load_blocks)) return stages;
  if (c.copy_bytes != 16 && c.copy_bytes != 8 && c.copy_bytes != 4 && c.copy_bytes != 2) return copy_bytes;
  if (arch < 80) return arch_too_old;
  if (c.dtype == DType::float64) return gpu_dtype;
  if (c.copy_bytes < size_of(c.dtype)) return copy_bytes;
  if (c.async_copy && c.copy_bytes < 4) return async_copy;
  int32_t const widths[] = {c.head_dim, c.head_dim_v};
  for (int32_t const d : widths) {
    if (d < 16 || d > 256 || d % 16 != 0) return gpu_head_dim;
    int32_t const rows = CopyShape::of(tile_of(c), d).rows_per_pass;
    if (c.block_m % rows != 0 || c.block_n % rows != 0) return copy_rows;
  }
  if (c.math == Math::tf32x3 && c.dtype != DType::float32) return tf32x3;
  if (c.math != Math::tensor_core && (c.q_in_registers || c.k_tiles_per_load != 0)) return fragments;
  if (c.k_tiles_per_load < 0 || c.k_tiles_per_load > 2) return k_tiles_per_load;
  if (c.k_tiles_per_load == 2 && (c.head_dim % 32 != 0 || c.block_n % 32 != 0)) return k_tiles_per_load;
  return none;
}

/// The first rule of the sm90 kernel that `c` breaks on `arch`.
constexpr ForwardConfigError check_sm90(ForwardConfig const& c, Arch arch) {
  using enum ForwardConfigError;
  if (arch != 90) return sm90_arch;
  if (c.dtype != DType::float16 && c.dtype != DType::bfloat16) return sm90_dtype;
  if (c.math != Math::tensor_core) return sm90_math;
  int32_t const widths[] = {c.head_dim, c.head_dim_v};
  for (int32_t const d : widths) {
    if (d < 64 || d > 256 || d % 32 != 0) return sm90_head_dim;
  }
  if (c.block_m < 64 || c.block_m > 192 || c.block_m % 64 != 0 || c.num_warps != c.block_m / 16) return sm90_block_m;
  if (c.stages < 2 || c.stages > 8) return sm90_stages;
  if (c.cluster != 1 && c.cluster != 2) return cluster;
  if (c.stale_max && (!c.overlap || !c.optimized_softmax || c.rescale_threshold == 0)) return stale_max;
  if (c.scores_ahead && !c.stale_max) return scores_ahead;
  if (c.late_store && !c.overlap) return late_store;
  return none;
}

/// The first rule that `c` breaks on `arch`.
constexpr ForwardConfigError check(ForwardConfig const& c, Arch arch) {
  using enum ForwardConfigError;
  if (c.block_n <= 0 || c.block_n > 256 || c.block_n % 16 != 0) return block_n;
  if (arch == cpu_arch) return check_cpu(c);
  if (!has_only_own_options(c)) return other_kernel;
  if (c.rescale_threshold < 0 || c.rescale_threshold > 8) return rescale_threshold;
  auto const broken = c.kernel == Kernel::sm90 ? check_sm90(c, arch) : check_sm80(c, arch);
  if (broken != none) return broken;
  return smem_bytes(c) > max_smem_bytes(arch) ? smem : none;
}

}  // namespace flashcute
