// The static configuration of a backward kernel, as forward_config.hpp for the forward.
#pragma once

#include "flashcute/core/forward_config.hpp"

namespace flashcute {

/// How to compute gradients: the options a user may choose. Options that ForwardConfig has too mean the same.
struct BackwardConfig {
  using Pass = BackwardPass;

  DType dtype = DType::bfloat16;
  int32_t head_dim = 128;         // of q and k: compiled width, runs any d up to it
  int32_t head_dim_v = head_dim;  // of v and the output: the same
  int32_t block_m = 64;           // B_r: query rows per tile
  int32_t block_n = 64;           // B_c: keys per tile
  int32_t num_warps = 4;
  Kernel kernel = Kernel::sm80;  // for every GPU, or Hopper's own
  int32_t column_warps = 1;      // sm80: warps along the columns of a score tile; 1: P and dS stay in registers
  int32_t blocks_per_sm = 2;
  Math math = Math::tensor_core;
  int32_t stages = 2;       // blocks in shared memory, of sm90 those of Q; 2: one arrives while the other is multiplied
  int32_t dout_stages = 2;  // sm90: blocks of dO in shared memory
  int32_t k_stages = 1;     // sm90: tiles of K in shared memory
  int32_t copy_bytes = 16;
  bool async_copy = true;
  bool swizzled = true;
  int32_t k_tiles_per_load = 0;
  bool mma_double_buffer = true;
  bool late_dq = true;         // sm90: a block's part of dQ is multiplied in the iteration after it
  bool early_reads = false;    // sm90: LSE and delta are read into registers before the products they wait behind
  bool persistent = true;      // sm90: a thread block computes tiles of keys one after the other (under a map one)
  bool deterministic = false;  // the same bits in every run: sm80 by two passes without atomics, sm90 by additions in
                               // a fixed order; on the CPU always so

  constexpr bool operator==(BackwardConfig const&) const = default;

  /// The table of the options.
  template <class Visit>
  static constexpr void for_each_member(Visit&& visit) {
    using C = BackwardConfig;
    using enum ReadBy;
    visit(Option{"dtype", all, nullptr}, &C::dtype);
    visit(Option{"head_dim", all, nullptr}, &C::head_dim);
    visit(Option{"head_dim_v", all, nullptr}, &C::head_dim_v);
    visit(Option{"block_m", all, nullptr}, &C::block_m);
    visit(Option{"block_n", all, nullptr}, &C::block_n);
    visit(Option{"num_warps", all, nullptr}, &C::num_warps);
    visit(Option{"kernel", all}, &C::kernel);
    visit(Option{"column_warps", sm80, "c"}, &C::column_warps);
    visit(Option{"blocks_per_sm", sm80, "b"}, &C::blocks_per_sm);
    visit(Option{"math", all}, &C::math);
    visit(Option{"stages", all, "st"}, &C::stages);
    visit(Option{"dout_stages", sm90, "dost"}, &C::dout_stages);
    visit(Option{"k_stages", sm90, "kst"}, &C::k_stages);
    visit(Option{"copy_bytes", sm80, "copy"}, &C::copy_bytes);
    visit(Option{"async_copy", sm80, "sync"}, &C::async_copy);
    visit(Option{"swizzled", sm80, "unswizzled"}, &C::swizzled);
    visit(Option{"k_tiles_per_load", sm80, "k"}, &C::k_tiles_per_load);
    visit(Option{"mma_double_buffer", sm80, "single"}, &C::mma_double_buffer);
    visit(Option{"late_dq", sm90, "promptdq"}, &C::late_dq);
    visit(Option{"early_reads", sm90, "earlyreads"}, &C::early_reads);
    visit(Option{"persistent", sm90, "onetile"}, &C::persistent);
    visit(Option{"deterministic", all, "deterministic"}, &C::deterministic);
  }
};

using BackwardKernelId = KernelId<BackwardConfig>;

/// Canonical name: "bwd_f32_d64_m64_n64_w4" and a word for every option that differs from the defaults.
constexpr Name name(BackwardConfig const& c) { return option_words("bwd", c); }

// ---- passes --------------------------------------------------------------------------------------

/// The passes of the backward on a GPU, in order of launch. The gradient of a sink takes the pass `sink` after them.
struct BackwardPasses {
  int32_t count;
  BackwardPass pass[3];

  constexpr BackwardPass const* begin() const { return pass; }
  constexpr BackwardPass const* end() const { return pass + count; }
};

/// Whether dQ has a pass of its own, and no sums to which many thread blocks add. Hopper's kernels for wide heads: the
/// accumulators of dK and dV leave no registers for a third.
constexpr bool splits_dq(BackwardConfig const& c) {
  return c.kernel == Kernel::sm80 ? c.deterministic : c.head_dim > 128;
}

constexpr BackwardPasses passes_of(BackwardConfig const& c) {
  using enum BackwardPass;
  if (splits_dq(c)) return {2, {queries, keys}};
  return {3, {prepare, gradients, finish}};
}

/// Whether a tile of the pass is one of keys, and blocks of queries pass by; else the reverse.
constexpr bool keys_stay(BackwardPass pass) { return pass == BackwardPass::keys || pass == BackwardPass::gradients; }

/// Whether a thread block of the pass computes tiles until there are no more. Where a map says which blocks a tile has,
/// finding them needs the registers that the next tile would need.
constexpr bool is_persistent(BackwardKernelId const& k) {
  bool const possible = k.config.kernel == Kernel::sm90 && k.pass == BackwardPass::gradients;
  return possible && k.config.persistent && k.features.mask != MaskKind::mapped;
}

/// The tile of a pass. prepare and finish use that of gradients.
constexpr TileConfig tile_of(BackwardConfig const& c, BackwardPass pass) {
  bool const of_queries = pass == BackwardPass::queries;
  return tile_with_rows(c, of_queries ? c.block_m : c.block_n, of_queries ? c.block_n : c.block_m);
}

/// Whether a configuration's kernels compute gradients under a mask. Of Hopper's those that add dQ in any order do; an
/// order, and passes of their own for wide heads, are there for the first two masks alone.
constexpr bool serves(BackwardConfig const& c, MaskKind mask) {
  bool const any = c.kernel == Kernel::sm80 || !(c.deterministic || splits_dq(c));
  return any || mask == MaskKind::full || mask == MaskKind::causal;
}

// ---- resources and rules -------------------------------------------------------------------------

/// Warps that load, inspect and add beside those that compute, in Hopper's passes that multiply.
inline constexpr int32_t serving_warps = 4;

/// Whether the pass multiplies; if it is Hopper's, it also loads by tensor maps.
constexpr bool multiplies(BackwardPass pass) { return pass == BackwardPass::queries || keys_stay(pass); }

constexpr int32_t num_threads(BackwardKernelId const& k) {
  bool const serves = k.config.kernel == Kernel::sm90 && multiplies(k.pass);
  return 32 * (k.config.num_warps + (serves ? serving_warps : 0));
}

/// Warps side by side along the columns of dQ = dS K in `gradients`: dQ has more columns than rows.
constexpr int32_t dq_column_warps(BackwardConfig const& c) { return c.num_warps / 2; }

/// Whether P, or dS, of a block goes through shared memory.
constexpr bool stores_p(BackwardConfig const& c, BackwardPass pass) { return c.column_warps > 1 && keys_stay(pass); }
constexpr bool stores_ds(BackwardConfig const& c, BackwardPass pass) {
  return c.column_warps > 1 || pass == BackwardPass::gradients;
}

/// Of Hopper's pass `gradients`: K and V; blocks of Q and dO with LSE and delta of their rows; two places for dS; dQ of
/// a block in fp32.
constexpr int64_t sm90_smem_bytes(BackwardConfig const& c) {
  int64_t const m = c.block_m, n = c.block_n, d = c.head_dim, d_v = c.head_dim_v, size = size_of(c.dtype);
  int64_t const dq = m * d * int64_t{sizeof(float)}, statistics = m * int64_t{sizeof(float)};
  constexpr int64_t control = 512;  // mbarriers, and what is announced of tiles and blocks
  int64_t const bytes = n * (c.k_stages * d + d_v) * size + c.stages * (m * d * size + statistics) +
                        c.dout_stages * (m * d_v * size + statistics) + 2 * m * n * size + dq + control;
  return ceil_div<int64_t>(bytes, 1024) * 1024;  // as a type that is so aligned
}

/// Of Hopper's pass `queries`: Q and dO, blocks of K, one of V, LSE and delta of the queries.
constexpr int64_t sm90_queries_smem_bytes(BackwardConfig const& c) {
  int64_t const m = c.block_m, n = c.block_n, d = c.head_dim, d_v = c.head_dim_v;
  return (m * (d + d_v) + n * (c.stages * d + d_v)) * size_of(c.dtype) + 2 * m * int64_t{sizeof(float)} + control_bytes;
}

/// Of Hopper's pass `keys`: K and V, blocks of Q and dO with LSE and delta of their rows, two places for P in fp32.
constexpr int64_t sm90_keys_smem_bytes(BackwardConfig const& c) {
  int64_t const m = warpgroup_rows, n = c.block_n, d = c.head_dim, d_v = c.head_dim_v, size = size_of(c.dtype);
  int64_t const statistics = m * int64_t{sizeof(float)};
  return n * (d + d_v) * size + c.stages * (m * d * size + statistics) + c.dout_stages * (m * d_v * size + statistics) +
         2 * m * n * int64_t{sizeof(float)} + control_bytes;
}

/// Dynamic shared memory of a kernel, in bytes: the tile's rows of K and V, or of Q and dO; `stages` blocks of the
/// other two; LSE and delta of the queries among these rows; tiles of P and dS where more than one warp reads them.
/// `finish` has only a tile of dQ.
constexpr int64_t smem_bytes(BackwardKernelId const& k) {
  BackwardConfig const& c = k.config;
  int64_t const size = size_of(c.dtype);
  if (k.pass == BackwardPass::sink) return c.num_warps * int64_t{sizeof(float)};
  if (c.kernel == Kernel::sm90) {
    if (k.pass == BackwardPass::queries) return sm90_queries_smem_bytes(c);
    if (k.pass == BackwardPass::keys) return sm90_keys_smem_bytes(c);
    return k.pass == BackwardPass::gradients ? sm90_smem_bytes(c) : 0;
  }
  if (k.pass == BackwardPass::prepare) return 0;
  if (k.pass == BackwardPass::finish) return c.block_m * c.head_dim * size;
  TileConfig const t = tile_of(c, k.pass);
  int64_t const stay = t.block_m, pass_by = int64_t{t.stages} * t.block_n;
  int64_t bytes = (stay + pass_by) * (c.head_dim + c.head_dim_v) * size;
  int64_t const score_tiles = (stores_p(c, k.pass) ? 1 : 0) + (stores_ds(c, k.pass) ? 1 : 0);
  bytes += score_tiles * c.block_m * c.block_n * size;
  bytes += 2 * (keys_stay(k.pass) ? pass_by : stay) * int64_t{sizeof(float)};
  return ceil_div<int64_t>(bytes, 128) * 128;
}

/// Of the pass that needs the most.
constexpr int64_t most_smem_bytes(BackwardConfig const& c) {
  int64_t most = 0;
  for (BackwardPass const pass : passes_of(c)) most = max_of(most, smem_bytes(kernel_of(c, pass, {})));
  return most;
}

/// Floats of workspace: delta (of the sm90 kernels a base-2 LSE and delta for every row of all tiles); then, unless dQ
/// has a pass of its own, the sums that become dQ, which start at a multiple of 16 bytes. Beside these sums sm90
/// kernels have a counter (uint32_t) from which thread blocks take tiles of keys, and if they are deterministic others
/// of the tiles that have added to each warpgroup's half of a block.
struct BackwardWorkspace {
  int64_t delta, dq_sums, counters = 0;

  constexpr int64_t total() const { return delta + dq_sums + counters; }
};

/// Of `heads` heads, each of `seqlen_q` rows in `blocks` tiles.
constexpr BackwardWorkspace workspace_of(BackwardConfig const& c, int64_t heads, int64_t seqlen_q, int64_t blocks) {
  int64_t const tiles = heads * blocks;
  int64_t const sums = splits_dq(c) ? 0 : tiles * c.block_m * c.head_dim;
  if (c.kernel == Kernel::sm90) {
    int64_t const counters = sums == 0 ? 0 : 1 + (c.deterministic ? tiles * (c.num_warps / 4) : 0);
    return {2 * tiles * c.block_m, sums, counters};
  }
  return {ceil_div<int64_t>(heads * seqlen_q, 4) * 4, sums};
}

constexpr BackwardWorkspace workspace_of(BackwardConfig const& c, int64_t heads, int64_t seqlen_q) {
  return workspace_of(c, heads, seqlen_q, ceil_div<int64_t>(seqlen_q, c.block_m));
}

// Every rule: an identifier and the sentence that C++ and Python show.
#define FLASHCUTE_BACKWARD_CONFIG_RULES(RULE)                                                                        \
  RULE(head_dim, "head_dim and head_dim_v must be between 1 and 256")                                                \
  RULE(block_m, "block_m must be a positive multiple of 16, at most 256")                                            \
  RULE(block_n, "block_n must be a positive multiple of 16, at most 256")                                            \
  RULE(other_kernel, "an option that only another kernel reads must have its default value")                         \
  RULE(arch_too_old, "the sm80 kernels need a GPU of compute capability 8.0 or later")                               \
  RULE(gpu_dtype, "dtype must be float16, bfloat16 or float32 on a GPU")                                             \
  RULE(gpu_head_dim, "head_dim and head_dim_v must be multiples of 16 between 16 and 256 on a GPU")                  \
  RULE(num_warps, "num_warps must be 4 or 8")                                                                        \
  RULE(column_warps, "column_warps must be 1, 2 or 4, and less than num_warps")                                      \
  RULE(shares,                                                                                                       \
       "the rows and columns of a score tile, and head_dim and head_dim_v, must be multiples of 16 times the warps " \
       "that share them")                                                                                            \
  RULE(blocks_per_sm, "blocks_per_sm must be between 1 and 16, and their threads must fit a multiprocessor")         \
  RULE(math, "math must be tensor_core, and tf32x3 for float32")                                                     \
  RULE(stages, "stages must be 1 or 2")                                                                              \
  RULE(copy_bytes, "copy_bytes must be 16, 8, 4 or 2, and at least the bytes of an element")                         \
  RULE(async_copy, "async_copy needs copy_bytes of 4 or more: cp.async cannot copy less")                            \
  RULE(copy_rows, "block_m and block_n must be multiples of the rows that all threads copy at once")                 \
  RULE(k_tiles_per_load,                                                                                             \
       "k_tiles_per_load must be 0, 1 or 2 (tf32x3: 0), and 2 needs widths that are multiples of 32")                \
  RULE(sm90_arch, "kernel = sm90 needs a GPU of compute capability 9.0: it is Hopper's")                             \
  RULE(sm90_dtype, "kernel = sm90 needs dtype float16 or bfloat16")                                                  \
  RULE(sm90_tile,                                                                                                    \
       "kernel = sm90 needs 8 warps, and block_m x block_n of 128 x 128 with head_dim 64, 64 x 128 with "            \
       "128, 128 x 64 with 192 and 256")                                                                             \
  RULE(sm90_head_dim, "kernel = sm90 needs head_dim_v = head_dim, or 128 with head_dim 192")                         \
  RULE(sm90_stages,                                                                                                  \
       "kernel = sm90 needs stages and dout_stages between 1 and 4, stages above 1 with head_dim above "             \
       "128")                                                                                                        \
  RULE(sm90_deterministic, "kernel = sm90 is always deterministic with head_dim above 128: it must be true")         \
  RULE(sm90_late_dq, "kernel = sm90 reads late_dq with head_dim up to 128 only: it must have its default value")     \
  RULE(sm90_persistent, "kernel = sm90 reads persistent with head_dim up to 128 only: it must be true")              \
  RULE(sm90_k_stages, "kernel = sm90 needs k_stages of 1 or 2, with head_dim above 128 of 1")                        \
  RULE(sm90_early_reads, "kernel = sm90 reads early_reads with head_dim 128 only: it must be false with others")     \
  RULE(smem, "block_m, block_n, stages and head_dim need more shared memory than a thread block of this GPU can have")

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

/// The first rule of the sm80 kernels that `c` breaks on `arch`.
constexpr BackwardConfigError check_sm80(BackwardConfig const& c, Arch arch) {
  using enum BackwardConfigError;
  if (c.num_warps != 4 && c.num_warps != 8) return num_warps;
  if (c.column_warps != 1 && c.column_warps != 2 && c.column_warps != 4) return column_warps;
  if (c.column_warps >= c.num_warps) return column_warps;
  if (c.blocks_per_sm < 1 || c.blocks_per_sm > 16) return blocks_per_sm;
  if (c.stages != 1 && c.stages != 2) return stages;
  if (c.copy_bytes != 16 && c.copy_bytes != 8 && c.copy_bytes != 4 && c.copy_bytes != 2) return copy_bytes;
  if (c.k_tiles_per_load < 0 || c.k_tiles_per_load > 2) return k_tiles_per_load;
  if (arch < 80) return arch_too_old;
  if (c.dtype == DType::float64) return gpu_dtype;
  if (c.math != (c.dtype == DType::float32 ? Math::tf32x3 : Math::tensor_core)) return math;
  if (c.copy_bytes < size_of(c.dtype)) return copy_bytes;
  if (c.math != Math::tensor_core && c.k_tiles_per_load != 0) return k_tiles_per_load;
  if (32 * c.num_warps * c.blocks_per_sm > max_threads_per_sm(arch)) return blocks_per_sm;
  if (c.async_copy && c.copy_bytes < 4) return async_copy;
  int32_t const widths[] = {c.head_dim, c.head_dim_v};
  for (int32_t const d : widths) {
    if (d < 16 || d % 16 != 0) return gpu_head_dim;
    int32_t const rows = CopyShape::of(tile_of(c, BackwardPass::keys), d).rows_per_pass;
    if (c.block_m % rows != 0 || c.block_n % rows != 0) return copy_rows;
    if (c.k_tiles_per_load == 2 && (d % 32 != 0 || c.block_m % 32 != 0)) return k_tiles_per_load;
  }
  for (BackwardPass const pass : passes_of(c)) {
    TileConfig const t = tile_of(c, pass);
    if (t.block_m % (16 * c.num_warps / c.column_warps) != 0 || t.block_n % (16 * c.column_warps) != 0) return shares;
    if (c.head_dim % (16 * c.column_warps) != 0 || c.head_dim_v % (16 * c.column_warps) != 0) return shares;
    if (pass == BackwardPass::gradients) {
      if (c.block_m % (16 * c.num_warps / dq_column_warps(c)) != 0) return shares;
      if (c.head_dim % (16 * dq_column_warps(c)) != 0) return shares;
    }
    if (smem_bytes(kernel_of(c, pass, {})) > max_smem_bytes(arch)) return smem;
  }
  return none;
}

/// The first rule of Hopper's kernels that `c` breaks on `arch`.
constexpr BackwardConfigError check_sm90(BackwardConfig const& c, Arch arch) {
  using enum BackwardConfigError;
  if (arch != 90) return sm90_arch;
  if (c.dtype != DType::float16 && c.dtype != DType::bfloat16) return sm90_dtype;
  if (c.math != Math::tensor_core) return math;
  bool const wide = splits_dq(c), known = wide ? c.head_dim == 192 || c.head_dim == 256 : c.head_dim % 64 == 0;
  int32_t const rows = c.head_dim == 128 ? 64 : 128;
  if (!known || c.block_m != rows || c.block_n != (wide ? 64 : 128) || c.num_warps != 8) return sm90_tile;
  if (c.head_dim_v != c.head_dim && (c.head_dim != 192 || c.head_dim_v != 128)) return sm90_head_dim;
  if (c.stages < (wide ? 2 : 1) || c.stages > 4 || c.dout_stages < 1 || c.dout_stages > 4) return sm90_stages;
  if (wide && !c.deterministic) return sm90_deterministic;
  if (wide && !c.late_dq) return sm90_late_dq;
  if (wide && !c.persistent) return sm90_persistent;
  if (c.k_stages < 1 || c.k_stages > (wide ? 1 : 2)) return sm90_k_stages;
  if (c.early_reads && c.head_dim != 128) return sm90_early_reads;
  return most_smem_bytes(c) > max_smem_bytes(arch) ? smem : none;
}

/// The first rule that `c` breaks on `arch`. Only the first three apply to the CPU.
constexpr BackwardConfigError check(BackwardConfig const& c, Arch arch) {
  using enum BackwardConfigError;
  int32_t const widths[] = {c.head_dim, c.head_dim_v};
  for (int32_t const d : widths) {
    if (d < 1 || d > 256) return head_dim;
  }
  if (c.block_m <= 0 || c.block_m > 256 || c.block_m % 16 != 0) return block_m;
  if (c.block_n <= 0 || c.block_n > 256 || c.block_n % 16 != 0) return block_n;
  if (arch == cpu_arch) return none;
  if (!has_only_own_options(c)) return other_kernel;
  return c.kernel == Kernel::sm80 ? check_sm80(c, arch) : check_sm90(c, arch);
}

/// The configuration of the CPU backend: a tile and a block that fit the level 2 cache at every head dim.
constexpr BackwardConfig cpu_backward_config(DType dtype, int32_t head_dim, int32_t head_dim_v) {
  return {.dtype = dtype, .head_dim = head_dim, .head_dim_v = head_dim_v, .block_m = 64, .block_n = 64};
}

}  // namespace flashcute
