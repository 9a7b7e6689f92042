// The C++ interface: tensors in, attention out, on a GPU or the CPU. The Python bindings, the tests and
// the benchmarks use this header and nothing below it. Plain C++20; no CUDA header is needed.
#pragma once

#include <array>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "flashcute/core/backward_config.hpp"
#include "flashcute/core/forward_config.hpp"
#include "flashcute/error.hpp"

// What a shared library exports is declared here and in error.hpp.
#pragma GCC visibility push(default)

namespace flashcute {

enum class DeviceType : uint8_t { cpu, cuda };

struct Device {
  DeviceType type = DeviceType::cpu;
  int index = 0;

  bool operator==(Device const&) const = default;
};

std::string to_string(Device device);  // "cpu", "cuda:0"

/// A tensor in memory that the caller owns. Strides count elements.
struct TensorView {
  void* data = nullptr;
  ElementType dtype = ElementType::float32;
  Device device;
  int rank = 0;
  std::array<int64_t, 4> shape{};
  std::array<int64_t, 4> strides{};
  bool read_only = false;
};

/// A tensor and the name of the argument that it was passed as, for error messages.
struct Argument {
  char const* name;
  TensorView const* tensor;
};

/// bshd: (batch, seqlen, heads, head_dim); bhsd: (batch, heads, seqlen, head_dim).
enum class Layout : uint8_t { bshd, bhsd };

/// Any mask of given sizes as data: which queries see which keys. `words`, which `build_block_mask` writes, is int32,
/// contiguous, at a multiple of 8 bytes. `batch` and `heads` (of queries) are those of the calls, or 1: one mask for
/// all.
struct BlockMask {
  TensorView const* words = nullptr;  // null: no mask
  int64_t batch = 1, heads = 1;
  int64_t seqlen_q = 0, seqlen_k = 0;
};

/// The options of every call. Each function reads those that concern it.
struct CallOptions {
  bool causal = false;
  // Causal: key j is visible to query i iff j <= i + diagonal. Default seqlen_k - seqlen_q: the last query sees the
  // last key. With 0 the first query sees the first key only. A window lies about the diagonal, causal or not.
  std::optional<int64_t> diagonal;
  // How many keys before and after the diagonal a query sees, beside the key on it: i + diagonal - left <= j <= i +
  // diagonal + right. Counts >= 0; default no limit. With causal, `right` changes nothing.
  std::optional<int64_t> window_left, window_right;
  // Of each batch entry, how many of its queries and of its keys exist: int32 (batch,), contiguous, on the tensors'
  // device; null: all. Numbers below 0 count as 0, those above the tensor's length as that. A query that does not exist
  // has output 0, LSE -inf and gradient 0; a key that does not exist changes nothing, whatever it holds, and its
  // gradients are 0. A diagonal that is not given is the difference of these lengths.
  TensorView const *seqlens_q = nullptr, *seqlens_k = nullptr;
  // With causal: the keys before this number are visible to every query, as far as the window reaches. One number >= 0
  // for all batch entries, or int32 (batch,), contiguous, on the tensors' device.
  std::optional<int64_t> prefix;
  TensorView const* prefixes = nullptr;
  // Packed sequences: q is (total_q, heads, d), k and v are (total_k, kv_heads, d) (in the other layout (heads, total,
  // d)), and so are out and all gradients; the LSE is (heads, total_q). n sequences lie one after the other: sequence i
  // has the rows from cu_seqlens[i] up to cu_seqlens[i + 1] of its tensors, int32 (n + 1,), contiguous, on the tensors'
  // device; cu_seqlens_k is that of the queries by default. Each sequence is a batch entry: seqlens and prefixes have n
  // numbers, and rows of a sequence from its seqlen on do not exist, nor do rows of no sequence. Numbers that are no
  // ascending order of rows of the tensors give wrong results, and no access outside of them.
  TensorView const *cu_seqlens_q = nullptr, *cu_seqlens_k = nullptr;
  // A further logit of each query head, (heads,), contiguous, fp32 or q's dtype: it takes part in the softmax, as it
  // is, and its value is 0. The LSE includes it.
  TensorView const* sink = nullptr;
  // A query sees no key that the mask hides. The other options hide what they hide beside it.
  BlockMask block_mask;
  std::optional<double> scale;  // of the scores, finite and >= 0; default head_dim^-0.5
  Layout layout = Layout::bshd;
  void* stream = nullptr;      // CUstream of the tensors' device; the default stream if null
  bool allow_tf32 = false;     // a default configuration for float32 may use one product of TF32, not three
  bool deterministic = false;  // a default configuration of the backward gives the same bits in every run
  // `backward` will be called for this call, without a configuration: `explain` reports on it too, and a `forward` that
  // has to compile its kernel compiles those of `backward` at the same time.
  bool gradients_follow = false;
};

inline bool has_window(CallOptions const& options) { return options.window_left || options.window_right; }
inline bool has_lengths(CallOptions const& options) {
  return options.seqlens_q != nullptr || options.seqlens_k != nullptr;
}
inline bool is_packed(CallOptions const& options) { return options.cu_seqlens_q != nullptr; }
inline bool has_block_mask(CallOptions const& options) { return options.block_mask.words != nullptr; }
inline bool has_prefix(CallOptions const& options) { return options.prefix || options.prefixes != nullptr; }

/// How the gradients of a call are computed, and why.
struct BackwardExplanation {
  std::string backend;  // "sm90", "sm80" or "cpu"; empty if no backend can compute them
  std::optional<BackwardConfig> config;
  // Each kernel (its entry point, or the CPU's instruction set) in the order of launches, and where it comes from.
  std::vector<std::pair<std::string, std::string>> kernels;
  int64_t workspace_bytes = 0;  // of memory that a call on a GPU needs in addition to its results
  bool same_bits = false;       // whether every run gives the same bits
  std::vector<std::pair<std::string, std::string>> rejected;  // each alternative, and why it was not taken
  std::vector<std::string> notes;                             // what else the call will do or cost
  std::vector<std::string> reasons;                           // why this backend and configuration, in sentences

  bool operator==(BackwardExplanation const&) const = default;
};

/// What a call runs, and why.
struct Explanation {
  std::string backend;  // "sm90" (Hopper's kernel), "sm80" or "cpu"; empty if nothing can run the call
  std::optional<ForwardConfig> config;
  std::string kernel;  // name of the entry point, or of the CPU instruction set
  std::string image;   // where the kernel comes from: "ahead of time", "run-time compilation ...", "none: ..."
  std::vector<std::pair<std::string, std::string>> rejected;  // each alternative, and why it was not taken
  std::vector<std::string> notes;                             // what else the call will do or cost
  std::vector<std::string> reasons;                           // why this backend and configuration, in sentences
  std::optional<BackwardExplanation> gradients;  // with options.gradients_follow, if q, k and v fit together

  bool operator==(Explanation const&) const = default;
};

/// "ForwardConfig(dtype='bfloat16', head_dim=128, block_m=128, block_n=64, stages=2)": valid Python. Of the options
/// beside these four it shows those that differ from their defaults.
std::string to_string(ForwardConfig const& config);
std::string to_string(BackwardConfig const& config);

/// A few lines for human readers; the alternatives that were not taken are grouped by reason.
std::string to_string(Explanation const& explanation);
std::string to_string(BackwardExplanation const& explanation);

/// Computes out = softmax(scale * q k^T) v.
///
/// q (batch, seqlen_q, heads, d), k (batch, seqlen_k, kv_heads, d), v (batch, seqlen_k, kv_heads, d_v), out
/// (batch, seqlen_q, heads, d_v), in the order that `options.layout` says; d, d_v <= 256; all of one dtype, on one
/// device, with unit last stride. `lse`, if given, is (batch, heads, seqlen_q), contiguous, fp32 (fp64 with fp64
/// inputs): log(sum(exp(scores))). `block_counts`, if given, receives how each tile of query rows treated the K/V
/// blocks, int32 (batch, heads, row blocks, 3), contiguous: how many were visited whole, visited with a test of
/// elements, skipped. (Packed: (heads, slots, 3), where a tensor has floor(total_q / tile) + n + 2 slots, sequence i
/// those from floor(cu_seqlens_q[i] / tile) + i + 1 on; slots without rows are not written.) If `config` is empty, the
/// call uses what `config_for` returns.
///
/// On a GPU the kernel is launched on `options.stream` and the call returns; on the CPU it returns when
/// the output is there. Throws before anything is launched or written: ArgumentError, ConfigError,
/// UnsupportedError, DeviceError; DriverError or CompileError if CUDA fails.
void forward(std::optional<ForwardConfig> const& config, TensorView const& q, TensorView const& k, TensorView const& v,
             TensorView const& out, TensorView const* lse, CallOptions const& options = {},
             TensorView const* block_counts = nullptr);

/// Computes the gradients dq, dk and dv of a forward call from those of its results.
///
/// q, k, v are the inputs of `forward`, out and lse its results; dout is shaped like out, dlse (may be null) like lse.
/// dq, dk and dv are shaped like q, k and v and are overwritten; gradients of keys and values are sums over the
/// query heads that share them. The last stride of every tensor but dlse is 1; lse is contiguous.
///
///     P = exp(scale q k^T - lse)    dS = P * (dout v^T - rowsum(dout * out) + dlse)
///     dq = scale dS k               dk = scale dS^T q               dv = P^T dout
///
/// Rows that see no key, and keys that no row sees, get zeros. On the CPU, and with config.deterministic on a GPU, the
/// result is the same bit for bit in every call; otherwise the terms of dq are added in no fixed order.
///
/// On a GPU, where q has float16, bfloat16 or float32, the kernels are launched on `options.stream` and the call
/// returns; they need `workspace`: float32, contiguous, at least backward_workspace_size elements, at a multiple of 16
/// bytes, which is overwritten, and free for other work on the stream after the call. It is ignored on the CPU,
/// where the call returns when the gradients are there. `dsink`, if given, is shaped like `options.sink` and receives
/// its gradient, -sum(exp(sink - lse) (rowsum(dout * out) - dlse)) over all queries of a head; it is 0 for a sink of
/// -inf. Throws, as `forward` does, before anything is launched or written.
void backward(std::optional<BackwardConfig> const& config, TensorView const& dout, TensorView const& q,
              TensorView const& k, TensorView const& v, TensorView const& out, TensorView const& lse,
              TensorView const* dlse, TensorView const& dq, TensorView const& dk, TensorView const& dv,
              CallOptions const& options = {}, TensorView const* workspace = nullptr,
              TensorView const* dsink = nullptr);

/// How many elements of float32 a call needs as its workspace, with the default configuration if none is given; 0 on
/// the CPU. Packed sequences need more, by their number.
int64_t backward_workspace_size(std::optional<BackwardConfig> const& config, TensorView const& q, TensorView const& v,
                                CallOptions const& options = {});

/// What `build_block_mask` makes a mask from: a query sees a key if all that is given says so.
struct BlockMaskRules {
  /// Boolean, (batch, heads, seqlen_q, seqlen_k) of the mask, or 1 in place of any, with any strides: true keeps.
  TensorView const* dense = nullptr;
  /// int32, (batch, seqlen_q) and (batch, seqlen_k), or with 1 in place of the batch, the last stride 1: a query sees
  /// the keys with its own number. A number below 0 sees nothing and is seen by none.
  TensorView const *documents_q = nullptr, *documents_k = nullptr;
  /// Other masks of the same seqlens: both have to show a key; or either; or the first without the second.
  enum class Operation : uint8_t { both, either, first_only };
  BlockMask first, second;
  Operation operation = Operation::both;
};

/// How many elements the words of a mask have (`mask.words` is not read): with room for `partial_cells` cells of 64 x
/// 64 elements of which some are visible and some are not, as counted along the queries or the keys. By default there
/// is room for all cells.
int64_t block_mask_size(BlockMask const& mask, std::optional<int64_t> partial_cells = {});

/// Writes a mask to `mask.words`. Its first two elements are then the numbers of partial cells, by query and by key. If
/// there is not room for as many, all that calls with the mask compute is NaN. On a GPU the kernel is launched on
/// `stream` and the call returns.
void build_block_mask(BlockMask const& mask, BlockMaskRules const& rules, void* stream = nullptr);

/// The default configuration of the backward for a head dimension (of v: head_dim_v), where addresses and strides are
/// multiples of 16 bytes. `causal`: for the causal mask; every configuration computes others too, but the fastest
/// may be another one. Throws UnsupportedError if there is none.
BackwardConfig default_backward_config(DType dtype, int64_t head_dim, Arch arch, std::optional<int64_t> head_dim_v = {},
                                       bool deterministic = false, bool causal = false);

/// The default configuration for these tensors. `others` are the further tensors of the call that kernels copy, as far
/// as they exist yet: out, dout, dq, dk and dv. Their addresses and strides limit `copy_bytes`.
BackwardConfig backward_config_for(TensorView const& q, TensorView const& k, TensorView const& v,
                                   std::initializer_list<Argument> others = {}, CallOptions const& options = {});

/// The configurations of the backward whose GPU kernels were compiled ahead of time.
std::vector<BackwardConfig> backward_configs();

/// Throws ConfigError with the first rule that the configuration breaks and the values that broke it.
void check_config(BackwardConfig const& config, Arch arch);

/// The Arch of a device, for check_config: cpu_arch, or the GPU's compute capability * 10.
Arch arch_of(Device device);

/// The default configuration of the forward for a head dimension (of v: head_dim_v), where addresses and strides are
/// multiples of 16 bytes, there is work for the whole GPU, and every kernel's image is available.
ForwardConfig default_config(DType dtype, int64_t head_dim, Arch arch, std::optional<int64_t> head_dim_v = {});

/// The configuration that `forward` chooses for these tensors (`out` may be null) if it is given none: the fastest of
/// those whose kernel has an image already or, if none has, of those that can be compiled. `count_blocks`: whether the
/// call is given `block_counts`.
ForwardConfig config_for(TensorView const& q, TensorView const& k, TensorView const& v, TensorView const* out,
                         CallOptions const& options = {}, bool count_blocks = false);

/// Throws ConfigError with the first rule that the configuration breaks and the values that broke it.
void check_config(ForwardConfig const& config, Arch arch);

/// The configurations whose GPU kernels were compiled ahead of time.
std::vector<ForwardConfig> configs();

/// Throws ArgumentError if q, k, v and the scale do not fit together: for callers that compute attention by other
/// means.
void check_problem(TensorView const& q, TensorView const& k, TensorView const& v, CallOptions const& options = {});

/// What `forward` with a given configuration, or with the default one, would run for these tensors (`out` may be null)
/// and why; with options.gradients_follow also what `backward` without a configuration would run. (That is an option
/// because `forward` is given the same one.) Launches nothing.
Explanation explain(std::optional<ForwardConfig> const& config, TensorView const& q, TensorView const& k,
                    TensorView const& v, CallOptions const& options = {}, TensorView const* out = nullptr);

/// Makes the kernels of configurations available for compute capability `arch` (80 means 8.0): finds them among the
/// ahead-of-time images or in the disk cache, or compiles them, several at the same time. Needs no GPU. `features`:
/// what the kernels compute, one of each for each element; if it is empty, attention without a mask, and causal
/// attention. Returns where each came from, by kernel name.
std::vector<std::pair<std::string, std::string>> prebuild(std::span<ForwardConfig const> forward,
                                                          std::span<BackwardConfig const> backward, Arch arch,
                                                          std::span<Features const> features = {});
inline auto prebuild(ForwardConfig const& config, Arch arch, std::span<Features const> features = {}) {
  return prebuild(std::span(&config, 1), {}, arch, features);
}
inline auto prebuild(BackwardConfig const& config, Arch arch, std::span<Features const> features = {}) {
  return prebuild({}, std::span(&config, 1), arch, features);
}

// ---- facts about this build and this machine -----------------------------------------------------

struct GpuInfo {
  int index;
  std::string name;
  Arch arch;  // compute capability * 10

  bool operator==(GpuInfo const&) const = default;
};

struct DriverInfo {
  bool available = false;
  std::string problem;   // why not
  int cuda_version = 0;  // 13000 for 13.0
  std::vector<GpuInfo> gpus;

  bool operator==(DriverInfo const&) const = default;
};

/// Initialises the CUDA driver, which neither loading the library nor importing the Python package does.
DriverInfo driver_info();

std::string build_version();  // "0.1.0"

struct BuildInfo {
  std::string image_archs;     // "80 90 100 120 80-ptx"; empty: built without images
  std::string image_compiler;  // "nvcc 13.0"; empty: built without images
  std::string jit_compiler;    // "NVRTC 13.0 (path)"; empty if there is none
  std::string jit_problem;     // why there is none, and how to install it
  std::string cache_folder;
  int64_t cache_limit = 0;  // bytes
  std::string cpu_isa;
  int cpu_threads = 0;

  bool operator==(BuildInfo const&) const = default;
};
BuildInfo build_info();

// ---- images that were compiled at run time, in the disk cache -------------------------------------

struct CachedImage {
  std::string kernel;
  std::string target;    // "sm_80"
  std::string compiler;  // "NVRTC 13.0"
  int64_t size;          // bytes
  double last_used;      // seconds since 1970

  bool operator==(CachedImage const&) const = default;
};

/// The most recently used first. This and the next two throw a CacheError if others can write into the folder.
std::vector<CachedImage> cached_images();

/// Verifies each image as loading does, and removes those that are damaged. What became of each is "whole", "removed",
/// "in use" (not touched: another process compiles or removes it) or "failed" (to remove it).
std::vector<std::pair<CachedImage, std::string>> check_cached_images();

/// Removes all images. What became of each is "removed", "in use" or "failed".
std::vector<std::pair<CachedImage, std::string>> clear_cached_images();

/// An environment variable that flashcute reads.
struct EnvironmentVariable {
  char const* name;
  char const* default_value;
  char const* meaning;
  std::string problem;  // what is wrong with its value; empty: nothing
};
std::vector<EnvironmentVariable> environment_variables();

/// A copy of the environment variables that flashcute reads, taken when it is made. While it lives, calls of this
/// thread read the copy. For programs in which another thread may change the environment during a call: in the C
/// library getenv is not safe while another thread calls setenv.
class EnvironmentSnapshot {
 public:
  EnvironmentSnapshot();
  ~EnvironmentSnapshot();
  EnvironmentSnapshot(EnvironmentSnapshot const&) = delete;
  EnvironmentSnapshot& operator=(EnvironmentSnapshot const&) = delete;

  /// "" if it is not set.
  std::string value(std::string_view name) const;

 private:
  std::vector<std::string> entries_;  // "NAME=value"
  EnvironmentSnapshot const* outer_;  // of this thread, made earlier
};

/// Sets where the library looks: `package_roots`, folders of installed Python packages, for NVRTC and CUDA headers;
/// `device_headers`, the folders with the headers that run-time compilation includes; `compiler`, the program
/// flashcute_compiler, which compiles several kernels at the same time. Without it, kernels are compiled in this
/// process, one after the other. Nothing is opened before it is needed.
///
/// For device headers or a compiler that are not given, the library looks where it was installed: beside the shared
/// library, in flashcute/; or, if a static library is part of a program in bin/, in lib/flashcute/ of the same prefix.
/// The CMake package calls that folder flashcute_SUPPORT_DIR. It has the device headers in include/ and include/cccl/,
/// and flashcute_compiler.
void set_search_paths(std::vector<std::string> package_roots, std::vector<std::string> device_headers,
                      std::string compiler = {});

}  // namespace flashcute

#pragma GCC visibility pop
