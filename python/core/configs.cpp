// ForwardConfig and BackwardConfig in Python, and the functions that tell of them.
#include "bind.hpp"
#include "gil.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace flashcute::python {
namespace {

// ---- dtypes, architectures ------------------------------------------------------------------------

/// "bfloat16", torch.bfloat16, numpy.dtype("float16"), numpy.float16, ...
DType to_dtype(nb::handle object) {
  nb::object text;
  if (nb::isinstance<nb::str>(object)) {
    text = nb::borrow(object);
  } else if (nb::hasattr(object, "name")) {
    text = object.attr("name");
  } else if (nb::hasattr(object, "__name__")) {
    text = object.attr("__name__");
  } else {
    text = nb::str(object);
  }
  std::string dtype = nb::cast<std::string>(nb::str(text));
  dtype = dtype.substr(dtype.rfind('.') + 1);
  for (DType t : {DType::float16, DType::bfloat16, DType::float32, DType::float64}) {
    if (dtype == name_of(t)) return t;
  }
  throw ArgumentError("dtype", "float16, bfloat16, float32 or float64", nb::cast<std::string>(nb::repr(object)));
}

/// "sm_80", "cpu", 80.
Arch to_arch(nb::handle object) {
  std::string const text = nb::cast<std::string>(nb::str(object));
  if (text == "cpu") return cpu_arch;
  std::string const digits = text.starts_with("sm_") ? text.substr(3) : text;
  if ((digits.size() == 2 || digits.size() == 3) && digits.find_first_not_of("0123456789") == std::string::npos) {
    return std::stoi(digits);
  }
  throw ArgumentError("arch", "'cpu' or a compute capability such as 'sm_80'", "'" + text + "'");
}

// ---- configurations --------------------------------------------------------------------------------

nb::object option_to_python(TabulatedEnum auto value) { return nb::str(name_of(value)); }
nb::object option_to_python(bool value) { return nb::bool_(value); }
nb::object option_to_python(int32_t value) { return nb::int_(value); }

void option_from_python(char const*, nb::handle object, DType& value) { value = to_dtype(object); }

template <TabulatedEnum Enum>
void option_from_python(char const* option, nb::handle object, Enum& value) {
  std::string allowed;
  int left = EnumTable<Enum>::count;
  for (auto const& row : EnumTable<Enum>::rows) {
    if (nb::isinstance<nb::str>(object) && nb::cast<std::string>(object) == row.name) {
      value = row.value;
      return;
    }
    --left;
    allowed += "'" + std::string(row.name) + "'" + (left > 1 ? ", " : left == 1 ? " or " : "");
  }
  throw ArgumentError(option, allowed, nb::cast<std::string>(nb::repr(object)));
}

void option_from_python(char const* option, nb::handle object, bool& value) {
  if (!nb::isinstance<nb::bool_>(object)) {
    throw ArgumentError(option, "True or False", nb::cast<std::string>(nb::repr(object)));
  }
  value = nb::cast<bool>(object);
}

/// Whether the object is a boolean, or an array or tensor of booleans.
bool is_truth(nb::handle object) {
  if (nb::isinstance<nb::bool_>(object)) return true;
  if (!nb::hasattr(object, "dtype")) return false;
  nb::object const dtype = object.attr("dtype");
  return nb::cast<std::string>(nb::str(nb::handle(dtype))).ends_with("bool");
}

void option_from_python(char const* option, nb::handle object, int32_t& value) {
  // An int, or what stands for one (numpy.int64): anything with __index__ but booleans, which some libraries' have too.
  int32_t number = 0;
  nb::object integer;
  if (PyIndex_Check(object.ptr()) && !is_truth(object)) integer = nb::steal(PyNumber_Index(object.ptr()));
  PyErr_Clear();  // of an array, whose class has __index__ and which is no number all the same
  if (!integer.is_valid() || !nb::try_cast(integer, number)) {
    throw ArgumentError(option, "an integer", nb::cast<std::string>(nb::repr(object)));
  }
  value = number;
}

template <class Config>
constexpr char const* class_name = nullptr;
template <>
constexpr char const* class_name<ForwardConfig> = "ForwardConfig";
template <>
constexpr char const* class_name<BackwardConfig> = "BackwardConfig";

/// head_dim_v stays equal to head_dim, if it is, unless it is given.
template <class Config>
void set_options(Config& config, nb::kwargs const& options) {
  bool const follows = config.head_dim_v == config.head_dim && !options.contains("head_dim_v");
  for (auto const& [key, value] : options) {
    std::string const option = nb::cast<std::string>(key);
    std::string known;
    bool found = false;
    for_each_option(config, [&](Option const& row, auto& member) {
      known += (known.empty() ? "" : ", ") + std::string(row.name);
      if (option != row.name) return;
      option_from_python(row.name, value, member);
      found = true;
    });
    if (!found) throw ArgumentError(class_name<Config>, "options among " + known, "'" + option + "'");
  }
  if (follows) config.head_dim_v = config.head_dim;
}

template <class Config>
nb::tuple options_of(Config const& config) {
  nb::list values;
  for_each_option(config, [&](Option const&, auto value) { values.append(option_to_python(value)); });
  return nb::tuple(values);
}

/// A read-only property for each option.
template <class Config>
void bind_options(nb::class_<Config>& cls) {
  Config::for_each_member([&]<class Value>(Option const& option, Value Config::* member) {
    std::string const type = std::is_enum_v<Value> ? "str" : std::is_same_v<Value, bool> ? "bool" : "int";
    std::string const signature = "def " + std::string(option.name) + "(self) -> " + type;
    cls.def_prop_ro(
        option.name, [member](Config const& config) { return option_to_python(config.*member); },
        nb::sig(signature.c_str()));
  });
}

/// An immutable, hashable value with a property for each option.
template <class Config>
nb::class_<Config> bind_config(nb::module_& m, char const* signature, char const* documentation) {
  std::string const replace_signature = std::string("def replace(self, **options: object) -> ") + class_name<Config>;
  auto cls = nb::class_<Config>(m, class_name<Config>, nb::is_final(), documentation);
  cls.def(
      "__init__",
      [](Config* self, nb::kwargs const& options) {
        Config config;
        set_options(config, options);
        new (self) Config(config);
      },
      nb::sig(signature));
  bind_options(cls);
  cls.def_prop_ro("name", [](Config const& c) { return std::string(name(c).text); }, "Canonical name.");
  cls.def(
      "replace",
      [](Config config, nb::kwargs const& options) {
        set_options(config, options);
        return config;
      },
      nb::sig(replace_signature.c_str()), "A copy with some options changed.");
  cls.def(
      "check", [](Config const& c, nb::handle arch) { check_config(c, to_arch(arch)); }, "arch"_a.none(),
      nb::sig("def check(self, arch: str | int) -> None"),
      "Raises ConfigError with the first rule broken on `arch` ('cpu', 'sm_80', ...).");
  cls.def(
      "__eq__", [](Config const& a, Config const& b) { return a == b; }, nb::is_operator(),
      nb::sig("def __eq__(self, other: object, /) -> bool"));
  cls.def("__hash__", [](Config const& c) { return nb::hash(options_of(c)); });
  cls.def("__repr__", [](Config const& c) { return to_string(c); });
  cls.def("__getstate__", &options_of<Config>, nb::sig("def __getstate__(self) -> tuple[object, ...]"));
  cls.def(
      "__setstate__",
      [](Config& self, nb::tuple const& values) {
        Config config;
        size_t i = 0;
        if (values.size() != options_of(config).size()) {
          throw ArgumentError("state", std::to_string(options_of(config).size()) + " options, as this version has",
                              std::to_string(values.size()));
        }
        for_each_option(config,
                        [&](Option const& row, auto& member) { option_from_python(row.name, values[i++], member); });
        new (&self) Config(config);
      },
      nb::sig("def __setstate__(self, values: tuple[object, ...], /) -> None"));
  return cls;
}

void bind_classes(nb::module_& m) {
  static constexpr char forward_signature[] =
      "def __init__(self, *, dtype: object = 'bfloat16', head_dim: int = 128, head_dim_v: int = ..., "
      "block_m: int = 128, block_n: int = 64, num_warps: int = 4, kernel: str = 'sm80', blocks_per_sm: int = 2, "
      "math: str = 'tensor_core', "
      "stages: int = 1, copy_bytes: int = 16, async_copy: bool = True, eager_load_blocks: bool = True, "
      "swizzled: bool = True, q_in_registers: bool = False, k_tiles_per_load: int = 0, "
      "mma_double_buffer: bool = True, optimized_softmax: bool = True, "
      "rescale_threshold: int = 8, pingpong: bool = True, overlap: bool = True, stale_max: bool = True, "
      "scores_ahead: bool = False, late_store: bool = False, cluster: int = 1) -> None";
  auto forward = bind_config<ForwardConfig>(
      m, forward_signature,
      "The static configuration of a forward kernel: immutable, hashable. See default_config.\n\n"
      "dtype: 'float16', 'bfloat16', 'float32', on the CPU also 'float64', or any library's dtype object.\n"
      "head_dim: compiled width of q and k; the kernel runs every head dimension up to it (on a GPU a multiple of 16, "
      "at most 256).\n"
      "head_dim_v: the same for v and the output; default head_dim.\n"
      "block_m: query rows per tile (B_r).  block_n: keys per K/V block (B_c).\n\n"
      "The CPU runs any configuration and ignores the other options:\n\n"
      "num_warps: warps of a thread block that compute; each owns 16-row slices of the tile.\n"
      "kernel: 'sm80' (cp.async, mma.sync; for every GPU of compute capability 8.0 or later) or 'sm90' (Hopper's: "
      "copies "
      "by TMA, products by WGMMA, specialised warps; num_warps is block_m / 16).\n"
      "math: 'tensor_core' (float32 is rounded to TF32, 10 bits of fraction), 'tf32x3' (float32 on tensor cores, three "
      "TF32 products for one) or 'cuda_core' (fp32); sm90: 'tensor_core'.\n"
      "stages: K/V blocks that shared memory holds; with 2 one arrives while the other is multiplied.\n"
      "optimized_softmax: one multiply-add and one exp2 per score, and the row sum reduced once at the end; False: as "
      "a textbook has it.\n"
      "rescale_threshold: t: rescale a row's sums only when an exponential would exceed 2^t; 0: in every block.\n\n"
      "A kernel refuses options that only the other one reads, unless they have their defaults. Of kernel='sm80':\n\n"
      "blocks_per_sm: thread blocks that must fit a multiprocessor at once, which limits their registers.\n"
      "copy_bytes: 16, 8, 4 or 2: how many bytes a thread copies between global and shared memory at once; addresses "
      "and strides of all tensors must be multiples of it.\n"
      "async_copy: copy to shared memory by cp.async; False: through registers.\n"
      "eager_load_blocks: copy a K or V block as soon as its place is free, not when it is needed.\n"
      "swizzled: swizzle shared memory by XOR, which avoids bank conflicts.\n"
      "q_in_registers: hold Q's fragments in registers through the K/V loop.\n"
      "k_tiles_per_load: how many K-steps of K or V each fetch brings from shared memory into registers (1 or 2); "
      "0: pieces of 16 columns of one step.\n"
      "mma_double_buffer: fetch the next fragments while the tensor cores work on these.\n\n"
      "Of kernel='sm90':\n\n"
      "pingpong: warpgroups take turns to start their products.\n"
      "overlap: the softmax of a block runs while P V of the block before is multiplied.\n"
      "stale_max: exponentials are taken relative to the maximum so far, and redone if they turn out too large.\n"
      "scores_ahead: the next block's scores are multiplied during a block's softmax, into registers of their own.\n"
      "late_store: a tile's output is written while the second scores of the next tile are multiplied, not the first.\n"
      "cluster: 2: pairs of thread blocks compute a tile of 2 * block_m query rows; each loads half of K and V, for "
      "both.");
  forward.def_prop_ro(
      "smem_bytes", [](ForwardConfig const& c) { return smem_bytes(c); },
      "Shared memory of a thread block, in bytes (GPU only).");
  static constexpr char backward_signature[] =
      "def __init__(self, *, dtype: object = 'bfloat16', head_dim: int = 128, head_dim_v: int = ..., "
      "block_m: int = 64, block_n: int = 64, num_warps: int = 4, kernel: str = 'sm80', column_warps: int = 1, "
      "blocks_per_sm: int = 2, math: str = 'tensor_core', stages: int = 2, dout_stages: int = 2, k_stages: int = 1, "
      "copy_bytes: int = 16, async_copy: bool = True, swizzled: bool = True, k_tiles_per_load: int = 0, "
      "mma_double_buffer: bool = True, late_dq: bool = True, early_reads: bool = False, persistent: bool = True, "
      "deterministic: bool = False) -> None";
  auto backward = bind_config<BackwardConfig>(
      m, backward_signature,
      "The static configuration of the backward: immutable, hashable. See default_backward_config.\n\n"
      "dtype: 'float16', 'bfloat16', 'float32', on the CPU also 'float64', or any library's dtype object.\n"
      "head_dim: compiled width of q and k; the kernels run every head dimension up to it (on a GPU a multiple of 16, "
      "at most 256).\n"
      "head_dim_v: the same for v and the output; default head_dim.\n"
      "block_m: query rows per tile (B_r).  block_n: keys per tile (B_c).\n\n"
      "The CPU ignores the other options; it gives the same bits in every run anyway:\n\n"
      "num_warps: warps per thread block.\n"
      "kernel: 'sm80' (cp.async, mma.sync), or 'sm90', Hopper's (TMA, WGMMA): float16 and bfloat16; if deterministic, "
      "or of head dimensions above 128, full and causal masks alone. sm90 ignores the options marked sm80, which must "
      "have their defaults, and the reverse.\n"
      "column_warps (sm80): how many of the warps share the columns of a tile of scores, while num_warps / "
      "column_warps share "
      "its rows; with 1, P and dS stay in registers.\n"
      "blocks_per_sm (sm80): thread blocks that must fit a multiprocessor at once, which limits their registers.\n"
      "math: 'tensor_core', for float32 'tf32x3' (three TF32 products for one).\n"
      "stages: blocks of the other side that shared memory holds, of sm90 those of Q; with 2 one arrives while the "
      "other is multiplied.\n"
      "dout_stages (sm90): the same of dO.\n"
      "k_stages (sm90, head dimensions up to 128): 1 or 2 tiles of K: with 2 that of the next tile is loaded early, "
      "and "
      "with late_dq a tile's last part of dq is multiplied in the first block of the next tile (of one tile each "
      "nothing is "
      "gained).\n"
      "copy_bytes (sm80): 16, 8, 4 or 2: how many bytes a thread copies between global and shared memory at once; "
      "addresses "
      "and strides of all tensors must be multiples of it.\n"
      "async_copy (sm80): copy to shared memory by cp.async; False: through registers.\n"
      "swizzled (sm80): swizzle shared memory by XOR, which avoids bank conflicts.\n"
      "k_tiles_per_load (sm80): how many K-steps of a product each fetch brings from shared memory into registers (1 "
      "or 2); "
      "0: pieces of 16 columns of one step.\n"
      "mma_double_buffer (sm80): fetch the next fragments while the tensor cores work on these.\n"
      "late_dq (sm90): multiply a block's part of dq an iteration later, so that the warpgroups never wait for each "
      "other's dS.\n"
      "early_reads (sm90, head_dim 128): read LSE and delta into registers before the products behind which they would "
      "wait.\n"
      "persistent (sm90, head dimensions up to 128): a thread block computes tiles of keys one after the other, and "
      "loads what the next one begins with while it ends with the one before; False, and under block masks: one tile "
      "each.\n"
      "deterministic: the same bits in every run: sm80 takes two passes without atomics, each of which recomputes the "
      "scores, sm90 adds the parts of dq in a fixed order; False: one pass that sums dq by atomics, in any order.");
  backward.def_prop_ro(
      "smem_bytes", [](BackwardConfig const& c) { return most_smem_bytes(c); },
      "Shared memory of a thread block of the pass that needs the most, in bytes (GPU only).");
}

std::vector<std::pair<std::string, std::string>> call_prebuild(std::vector<ForwardConfig> const& forward,
                                                               std::vector<BackwardConfig> const& backward,
                                                               nb::handle arch,
                                                               std::optional<std::string> const& mask) {
  Arch const target = to_arch(arch);
  std::vector<Features> features;
  for (MaskKind const kind : {MaskKind::full, MaskKind::causal, MaskKind::band, MaskKind::mapped}) {
    if (mask == name_of(kind)) features = {{.mask = kind}};
  }
  ReleaseGil const released;
  return prebuild(forward, backward, target, features);
}

}  // namespace

void bind_configs(nb::module_& m) {
  bind_classes(m);
  m.def(
      "default_config",
      [](nb::handle dtype, int64_t head_dim, nb::handle arch, std::optional<int64_t> head_dim_v) {
        return default_config(to_dtype(dtype), head_dim, to_arch(arch), head_dim_v);
      },
      "dtype"_a.none(), "head_dim"_a, "arch"_a.none(), "head_dim_v"_a.none());
  m.def(
      "default_backward_config",
      [](nb::handle dtype, int64_t head_dim, nb::handle arch, std::optional<int64_t> head_dim_v, bool deterministic,
         bool causal) {
        return default_backward_config(to_dtype(dtype), head_dim, to_arch(arch), head_dim_v, deterministic, causal);
      },
      "dtype"_a.none(), "head_dim"_a, "arch"_a.none(), "head_dim_v"_a.none(), "deterministic"_a = false,
      "causal"_a = false);
  m.def("configs", &configs);
  m.def("backward_configs", &backward_configs);
  m.def("prebuild", &call_prebuild, "forward"_a, "backward"_a, "arch"_a.none(), "mask"_a.none());
}

}  // namespace flashcute::python
