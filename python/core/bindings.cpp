// Python bindings: turns array objects into TensorViews and C++ exceptions into Python ones. Everything
// else is in flashcute/api.hpp (for C++) and the Python files beside this one.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <tuple>

#include "dlpack.hpp"
#include "exceptions.hpp"
#include "flashcute/api.hpp"
#include "gil.hpp"
#include "text.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace flashcute::python {

/// CallOptions as Python has them: without a stream, q's library says on which one a call on a GPU runs.
struct PythonOptions {
  CallOptions options;
  std::optional<std::uintptr_t> stream;

  /// What a tensor's library is told when it exports q.
  nb::object stream_object() const { return stream ? nb::object(nb::int_(*stream)) : nb::none(); }
};

// The members of the tuple Options of _call.py. Python makes one in every call, so it is read by position.
constexpr std::array option_names = {"causal", "diagonal",   "scale",         "layout",
                                     "stream", "allow_tf32", "deterministic", "gradients_follow"};

}  // namespace flashcute::python

template <>
struct nanobind::detail::type_caster<flashcute::python::PythonOptions> {
  NB_TYPE_CASTER(flashcute::python::PythonOptions, const_name("flashcute._call.Options"))

  bool from_python(handle source, uint8_t, cleanup_list*) noexcept {
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != flashcute::python::option_names.size()) {
      return false;
    }
    flashcute::CallOptions& o = value.options;
    Py_ssize_t next = 0;
    auto const item = [&] { return handle(PyTuple_GET_ITEM(source.ptr(), next++)); };
    return read(item(), o.causal) && read(item(), o.diagonal) && read(item(), o.scale) && read(item(), o.layout) &&
           read(item(), value.stream) && read(item(), o.allow_tf32) && read(item(), o.deterministic) &&
           read(item(), o.gradients_follow);
  }

 private:
  /// None is a deterministic that nobody decided.
  static bool read(handle object, bool& option) {
    option = object.ptr() == Py_True;
    return option || object.ptr() == Py_False || object.is_none();
  }

  static bool read(handle object, flashcute::Layout& option) {
    if (!PyUnicode_Check(object.ptr())) return false;
    bool const bhsd = PyUnicode_CompareWithASCIIString(object.ptr(), "bhsd") == 0;
    option = bhsd ? flashcute::Layout::bhsd : flashcute::Layout::bshd;
    return bhsd || PyUnicode_CompareWithASCIIString(object.ptr(), "bshd") == 0;
  }

  template <class Value>
  static bool read(handle object, std::optional<Value>& option) {
    return object.is_none() || try_cast(object, option);
  }
};

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

/// Names of folders, as os.fsencode gives them: they need not be text.
std::vector<std::string> to_strings(std::vector<nb::bytes> const& paths) {
  std::vector<std::string> strings;
  for (nb::bytes const& path : paths) strings.emplace_back(path.c_str(), path.size());
  return strings;
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

void bind_configs(nb::module_& m) {
  static constexpr char forward_signature[] =
      "def __init__(self, *, dtype: object = 'bfloat16', head_dim: int = 128, head_dim_v: int = ..., "
      "block_m: int = 128, block_n: int = 64, num_warps: int = 4, kernel: str = 'sm80', blocks_per_sm: int = 2, "
      "math: str = 'tensor_core', "
      "stages: int = 1, copy_bytes: int = 16, async_copy: bool = True, eager_load_blocks: bool = True, "
      "swizzled: bool = True, q_in_registers: bool = False, k_tiles_per_load: int = 0, "
      "mma_double_buffer: bool = True, optimized_softmax: bool = True, "
      "rescale_threshold: int = 8, pingpong: bool = True, overlap: bool = True, stale_max: bool = True, "
      "scores_ahead: bool = False, cluster: int = 1) -> None";
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
      "cluster: 2: pairs of thread blocks compute a tile of 2 * block_m query rows; each loads half of K and V, for "
      "both.");
  forward.def_prop_ro(
      "smem_bytes", [](ForwardConfig const& c) { return smem_bytes(c); },
      "Shared memory of a thread block, in bytes (GPU only).");
  static constexpr char backward_signature[] =
      "def __init__(self, *, dtype: object = 'bfloat16', head_dim: int = 128, head_dim_v: int = ..., "
      "block_m: int = 64, block_n: int = 64, num_warps: int = 4, kernel: str = 'sm80', column_warps: int = 1, "
      "blocks_per_sm: int = 2, math: str = 'tensor_core', stages: int = 2, copy_bytes: int = 16, async_copy: bool = "
      "True, "
      "swizzled: bool = True, k_tiles_per_load: int = 0, mma_double_buffer: bool = True, deterministic: bool = False) "
      "-> None";
  bind_config<BackwardConfig>(
      m, backward_signature,
      "The static configuration of the backward: immutable, hashable. See default_backward_config.\n\n"
      "dtype: 'float16', 'bfloat16', 'float32', on the CPU also 'float64', or any library's dtype object.\n"
      "head_dim: compiled width of q and k; the kernels run every head dimension up to it (on a GPU a multiple of 16, "
      "at most 256).\n"
      "head_dim_v: the same for v and the output; default head_dim.\n"
      "block_m: query rows per tile (B_r).  block_n: keys per tile (B_c).\n\n"
      "The CPU ignores the other options; it gives the same bits in every run anyway:\n\n"
      "num_warps: warps per thread block.\n"
      "kernel: 'sm80' (cp.async, mma.sync); there is no other yet.\n"
      "column_warps: how many of the warps share the columns of a tile of scores, while num_warps / column_warps share "
      "its rows; with 1, P and dS stay in registers.\n"
      "blocks_per_sm: thread blocks that must fit a multiprocessor at once, which limits their registers.\n"
      "math: 'tensor_core', for float32 'tf32x3' (three TF32 products for one).\n"
      "stages: blocks of the other side that shared memory holds; with 2 one arrives while the other is multiplied.\n"
      "copy_bytes: 16, 8, 4 or 2: how many bytes a thread copies between global and shared memory at once; addresses "
      "and strides of all tensors must be multiples of it.\n"
      "async_copy: copy to shared memory by cp.async; False: through registers.\n"
      "swizzled: swizzle shared memory by XOR, which avoids bank conflicts.\n"
      "k_tiles_per_load: how many K-steps of a product each fetch brings from shared memory into registers (1 or 2); "
      "0: pieces of 16 columns of one step.\n"
      "mma_double_buffer: fetch the next fragments while the tensor cores work on these.\n"
      "deterministic: the same bits in every run, by two passes without atomics, each of which recomputes the scores; "
      "False: one pass that sums dq by atomics.");
}

// ---- calls -----------------------------------------------------------------------------------------

/// q's library says on which stream a call on a GPU runs, unless the caller does: sets `launch_stream`, and returns
/// what the libraries of the other arrays are told.
nb::object choose_stream(Tensor const& q, PythonOptions const& options, void*& launch_stream) {
  if (q.view().device.type == DeviceType::cpu) return options.stream_object();
  launch_stream = options.stream ? reinterpret_cast<void*>(*options.stream) : q.current_stream();
  return nb::int_(reinterpret_cast<std::uintptr_t>(launch_stream));
}

template <class Config>
std::optional<Config> optional_of(Config const* config) {
  return config != nullptr ? std::optional(*config) : std::nullopt;
}

void call_forward(ForwardConfig const* config, nb::handle q, nb::handle k, nb::handle v, nb::handle out, nb::handle lse,
                  nb::handle block_counts, PythonOptions const& given) {
  CallOptions options = given.options;
  Tensor const tq("q", q, given.stream_object());
  nb::object const launch_stream = choose_stream(tq, given, options.stream);
  std::optional<Tensor> tk, tv, to, tl, tc;
  tk.emplace("k", k, launch_stream);
  tv.emplace("v", v, launch_stream);
  to.emplace("out", out, launch_stream);
  if (!lse.is_none()) tl.emplace("lse", lse, launch_stream);
  if (!block_counts.is_none()) tc.emplace("block_counts", block_counts, launch_stream);
  if (!given.stream) {
    // An array that was exported with no handshake is ordered on its own library's stream only.
    for (auto const& [argument, t] : {std::pair{"k", &tk}, std::pair{"v", &tv}, std::pair{"out", &to},
                                      std::pair{"lse", &tl}, std::pair{"block_counts", &tc}}) {
      if (*t) (*t)->require_stream(argument, options.stream);
    }
  }
  ReleaseGil const released;
  forward(optional_of(config), tq.view(), tk->view(), tv->view(), to->view(), tl ? &tl->view() : nullptr, options,
          tc ? &tc->view() : nullptr);
}

void call_backward(BackwardConfig const* config, nb::handle dout, nb::handle q, nb::handle k, nb::handle v,
                   nb::handle out, nb::handle lse, nb::handle dlse, nb::handle dq, nb::handle dk, nb::handle dv,
                   nb::handle workspace, PythonOptions const& given) {
  CallOptions options = given.options;
  Tensor const tq("q", q, given.stream_object());
  nb::object const launch_stream = choose_stream(tq, given, options.stream);
  std::optional<Tensor> tdout, tk, tv, to, tlse, tdlse, tdq, tdk, tdv, tw;
  for (auto const& [argument, t, array] :
       {std::tuple{"dout", &tdout, dout}, std::tuple{"k", &tk, k}, std::tuple{"v", &tv, v}, std::tuple{"out", &to, out},
        std::tuple{"lse", &tlse, lse}, std::tuple{"dlse", &tdlse, dlse}, std::tuple{"dq", &tdq, dq},
        std::tuple{"dk", &tdk, dk}, std::tuple{"dv", &tdv, dv}, std::tuple{"workspace", &tw, workspace}}) {
    bool const optional = t == &tdlse || t == &tw;
    if (optional && array.is_none()) continue;
    t->emplace(argument, array, launch_stream);
    if (!given.stream) (*t)->require_stream(argument, options.stream);
  }
  ReleaseGil const released;
  backward(optional_of(config), tdout->view(), tq.view(), tk->view(), tv->view(), to->view(), tlse->view(),
           tdlse ? &tdlse->view() : nullptr, tdq->view(), tdk->view(), tdv->view(), options,
           tw ? &tw->view() : nullptr);
}

int64_t call_backward_workspace_size(BackwardConfig const* config, nb::handle q, nb::handle v,
                                     PythonOptions const& given) {
  Tensor const tq("q", q, nb::none()), tv("v", v, nb::none());
  ReleaseGil const released;
  return backward_workspace_size(optional_of(config), tq.view(), tv.view(), given.options);
}

BackwardConfig call_backward_config_for(nb::handle q, nb::handle k, nb::handle v, PythonOptions const& given) {
  Tensor const tq("q", q, nb::none()), tk("k", k, nb::none()), tv("v", v, nb::none());
  ReleaseGil const released;
  return backward_config_for(tq.view(), tk.view(), tv.view(), {}, given.options);
}

std::vector<std::pair<std::string, std::string>> call_prebuild(std::vector<ForwardConfig> const& forward,
                                                               std::vector<BackwardConfig> const& backward,
                                                               nb::handle arch, std::optional<bool> causal) {
  Arch const target = to_arch(arch);
  std::vector<Features> features;
  if (causal) features = {{.mask = *causal ? MaskKind::causal : MaskKind::full}};
  ReleaseGil const released;
  return prebuild(forward, backward, target, features);
}

Explanation call_explain(ForwardConfig const* config, nb::handle q, nb::handle k, nb::handle v, nb::handle out,
                         PythonOptions const& given) {
  Tensor const tq("q", q, nb::none()), tk("k", k, nb::none()), tv("v", v, nb::none());
  if (tq.view().dtype == DType::int32) {
    throw ArgumentError("q", "dtype float16, bfloat16, float32 or float64", "int32");
  }
  std::optional<Tensor> to;
  if (!out.is_none()) to.emplace("out", out, nb::none());
  ReleaseGil const released;
  return explain(optional_of(config), tq.view(), tk.view(), tv.view(), given.options, to ? &to->view() : nullptr);
}

/// A member of a struct, and the name and the sentence by which Python knows it.
template <class Record, class Value>
struct Member {
  char const* name;
  Value Record::* value;
  char const* documentation = "";
};
template <class Record, class Value>
Member(char const*, Value Record::*, char const* = "") -> Member<Record, Value>;

/// Read-only attributes, equality, hash, repr, pickling and copying of a struct.
template <class Record, class... Values>
void bind_members(nb::class_<Record>& cls, std::string const& class_name, Member<Record, Values> const&... members) {
  (cls.def_ro(members.name, members.value, members.documentation), ...);
  cls.def(
      "__eq__", [](Record const& a, Record const& b) { return a == b; }, nb::is_operator(),
      nb::sig("def __eq__(self, other: object, /) -> bool"));
  cls.def("__hash__", [](nb::handle self) { return nb::hash(nb::repr(self)); });  // equal ones have equal reprs
  cls.def("__repr__", [=](Record const& record) {
    if constexpr (requires { to_string(record); }) {
      return to_string(record);
    } else {
      std::string text;
      auto const add = [&](auto const& member) {
        nb::object const value = nb::cast(record.*member.value, nb::rv_policy::copy);
        text += (text.empty() ? "" : ", ") + std::string(member.name) + "=" + nb::cast<std::string>(nb::repr(value));
      };
      (add(members), ...);
      return class_name + "(" + text + ")";
    }
  });
  cls.def(
      "__getstate__",
      [=](Record const& record) { return nb::make_tuple(nb::cast(record.*members.value, nb::rv_policy::copy)...); },
      nb::sig("def __getstate__(self) -> tuple[object, ...]"));
  cls.def(
      "__setstate__",
      [=](Record& self, nb::tuple const& values) {
        if (values.size() != sizeof...(members)) {
          throw ArgumentError("state", std::to_string(sizeof...(members)) + " members, as this version has",
                              std::to_string(values.size()));
        }
        Record record{};
        size_t i = 0;
        ((record.*members.value = nb::cast<Values>(values[i++])), ...);
        new (&self) Record(std::move(record));
      },
      nb::sig("def __setstate__(self, values: tuple[object, ...], /) -> None"));
}

void bind_explanations(nb::module_& m) {
  using Pairs = std::vector<std::pair<std::string, std::string>>;
  using Sentences = std::vector<std::string>;
  constexpr char const* rejected = "(alternative, reason) pairs: what was not taken, and why.";
  constexpr char const* notes = "What else the call will do or cost.";
  constexpr char const* reasons = "Why this backend and this configuration, in sentences.";
  nb::class_<BackwardExplanation> backward(m, "BackwardExplanation",
                                           "How the gradients of a call are computed, and why; see flashcute.explain.");
  backward.def(
      "__init__",
      [](BackwardExplanation* self, std::string backend, std::optional<BackwardConfig> const& config, Pairs kernels,
         int64_t workspace_bytes, bool same_bits, Pairs rejected, Sentences notes, Sentences reasons) {
        new (self)
            BackwardExplanation{std::move(backend),  config,           std::move(kernels), workspace_bytes, same_bits,
                                std::move(rejected), std::move(notes), std::move(reasons)};
      },
      nb::kw_only(), "backend"_a, "config"_a.none(), "kernels"_a, "workspace_bytes"_a, "same_bits"_a, "rejected"_a,
      "notes"_a, "reasons"_a);
  bind_members(
      backward, "BackwardExplanation",
      Member{"backend", &BackwardExplanation::backend,
             "'sm80' (the mma.sync kernels of every GPU), 'cpu', or '' if nothing computes the gradients."},
      Member{"config", &BackwardExplanation::config, "The configuration, or None."},
      Member{"kernels", &BackwardExplanation::kernels,
             "(kernel, image) pairs in the order of launches: its entry point, or the CPU's instruction set, and where "
             "it comes from."},
      Member{"workspace_bytes", &BackwardExplanation::workspace_bytes,
             "Memory that a call on a GPU needs beside its results."},
      Member{"same_bits", &BackwardExplanation::same_bits, "Whether every run gives the same bits."},
      Member{"rejected", &BackwardExplanation::rejected, rejected}, Member{"notes", &BackwardExplanation::notes, notes},
      Member{"reasons", &BackwardExplanation::reasons, reasons});
  nb::class_<Explanation> cls(m, "Explanation", "What a call runs, and why; see flashcute.explain. print() shows it.");
  cls.def(
      "__init__",
      [](Explanation* self, std::string backend, std::optional<ForwardConfig> const& config, std::string kernel,
         std::string image, Pairs rejected, Sentences notes, Sentences reasons,
         std::optional<BackwardExplanation> const& gradients) {
        new (self) Explanation{std::move(backend),  config,           std::move(kernel),  std::move(image),
                               std::move(rejected), std::move(notes), std::move(reasons), gradients};
      },
      nb::kw_only(), "backend"_a, "config"_a.none(), "kernel"_a, "image"_a, "rejected"_a, "notes"_a,
      "reasons"_a = Sentences{}, "gradients"_a.none() = nb::none());
  bind_members(
      cls, "Explanation",
      Member{"backend", &Explanation::backend,
             "'sm90' (Hopper's kernel), 'sm80' (the mma.sync kernel of every GPU), 'cpu', 'torch' (its own attention), "
             "or '' if nothing can run the call."},
      Member{"config", &Explanation::config, "The configuration, or None."},
      Member{"kernel", &Explanation::kernel, "Entry point of the kernel, or the CPU's instruction set."},
      Member{"image", &Explanation::image, "Where the kernel comes from."},
      Member{"rejected", &Explanation::rejected, rejected}, Member{"notes", &Explanation::notes, notes},
      Member{"reasons", &Explanation::reasons, reasons},
      Member{"gradients", &Explanation::gradients,
             "A BackwardExplanation where gradients are recorded or asked about, else None."});
}

void bind_facts(nb::module_& m) {
  nb::class_<GpuInfo> gpu(m, "GpuInfo", "A GPU that the driver sees.");
  bind_members(gpu, "GpuInfo", Member{"index", &GpuInfo::index}, Member{"name", &GpuInfo::name},
               Member{"arch", &GpuInfo::arch, "Compute capability * 10."});
  nb::class_<DriverInfo> driver(m, "DriverInfo", "The CUDA driver of this machine.");
  bind_members(driver, "DriverInfo", Member{"available", &DriverInfo::available},
               Member{"problem", &DriverInfo::problem, "Why there is no driver to use."},
               Member{"cuda_version", &DriverInfo::cuda_version, "The newest CUDA it runs: 13000 for 13.0."},
               Member{"gpus", &DriverInfo::gpus});
  nb::class_<BuildInfo> build(m, "BuildInfo", "What this build of flashcute contains.");
  bind_members(build, "BuildInfo", Member{"image_archs", &BuildInfo::image_archs},
               Member{"image_compiler", &BuildInfo::image_compiler}, Member{"jit_compiler", &BuildInfo::jit_compiler},
               Member{"jit_problem", &BuildInfo::jit_problem}, Member{"cache_folder", &BuildInfo::cache_folder},
               Member{"cache_limit", &BuildInfo::cache_limit, "Bytes of all images in it together."},
               Member{"cpu_isa", &BuildInfo::cpu_isa}, Member{"cpu_threads", &BuildInfo::cpu_threads});
  nb::class_<CachedImage> image(m, "CachedImage", "A kernel image in the disk cache.");
  bind_members(image, "CachedImage", Member{"kernel", &CachedImage::kernel}, Member{"target", &CachedImage::target},
               Member{"compiler", &CachedImage::compiler}, Member{"size", &CachedImage::size, "Bytes."},
               Member{"last_used", &CachedImage::last_used, "Seconds since 1970."});
}

}  // namespace
}  // namespace flashcute::python

NB_MODULE(_core, m) {
  using namespace flashcute;
  using namespace flashcute::python;
  // Objects that outlive the interpreter (in a traceback, in a test runner) are no leak of ours to report.
  nb::set_leak_warnings(false);
  bind_exceptions(m);
  bind_configs(m);
  bind_explanations(m);
  bind_facts(m);
  m.def("option_names", [] { return std::vector<std::string>(option_names.begin(), option_names.end()); });
  m.def("forward", &call_forward, "config"_a.none(), "q"_a.none(), "k"_a.none(), "v"_a.none(), "out"_a.none(),
        "lse"_a.none(), "block_counts"_a.none(), "options"_a);
  m.def("backward", &call_backward, "config"_a.none(), "dout"_a.none(), "q"_a.none(), "k"_a.none(), "v"_a.none(),
        "out"_a.none(), "lse"_a.none(), "dlse"_a.none(), "dq"_a.none(), "dk"_a.none(), "dv"_a.none(),
        "workspace"_a.none(), "options"_a);
  m.def("backward_workspace_size", &call_backward_workspace_size, "config"_a.none(), "q"_a.none(), "v"_a.none(),
        "options"_a);
  m.def("backward_config_for", &call_backward_config_for, "q"_a.none(), "k"_a.none(), "v"_a.none(), "options"_a);
  m.def(
      "check_problem",
      [](nb::handle q, nb::handle k, nb::handle v, PythonOptions const& given) {
        Tensor const tq("q", q, nb::none()), tk("k", k, nb::none()), tv("v", v, nb::none());
        check_problem(tq.view(), tk.view(), tv.view(), given.options);
      },
      "q"_a.none(), "k"_a.none(), "v"_a.none(), "options"_a);
  m.def("explain", &call_explain, "config"_a.none(), "q"_a.none(), "k"_a.none(), "v"_a.none(), "out"_a.none(),
        "options"_a);
  m.def(
      "default_config",
      [](nb::handle dtype, int64_t head_dim, nb::handle arch, std::optional<int64_t> head_dim_v) {
        return default_config(to_dtype(dtype), head_dim, to_arch(arch), head_dim_v);
      },
      "dtype"_a.none(), "head_dim"_a, "arch"_a.none(), "head_dim_v"_a.none());
  m.def(
      "default_backward_config",
      [](nb::handle dtype, int64_t head_dim, nb::handle arch, std::optional<int64_t> head_dim_v, bool deterministic) {
        return default_backward_config(to_dtype(dtype), head_dim, to_arch(arch), head_dim_v, deterministic);
      },
      "dtype"_a.none(), "head_dim"_a, "arch"_a.none(), "head_dim_v"_a.none(), "deterministic"_a = false);
  m.def("configs", &configs);
  m.def("backward_configs", &backward_configs);
  m.def("prebuild", &call_prebuild, "forward"_a, "backward"_a, "arch"_a.none(), "causal"_a.none());
  m.def("driver_info", &driver_info, nb::call_guard<ReleaseGil>());
  m.def("build_info", &build_info);
  m.def("build_version", &build_version);
  m.def("cached_images", &cached_images, nb::call_guard<ReleaseGil>());
  m.def("check_cached_images", &check_cached_images, nb::call_guard<ReleaseGil>());
  m.def("clear_cached_images", &clear_cached_images, nb::call_guard<ReleaseGil>());
  m.def("environment_variables", [] {
    std::vector<std::vector<std::string>> rows;
    for (auto const& v : environment_variables()) rows.push_back({v.name, v.default_value, v.meaning, v.problem});
    return rows;
  });
  m.def(
      "set_search_paths",
      [](std::vector<nb::bytes> const& package_roots, std::vector<nb::bytes> const& device_headers,
         nb::bytes const& compiler) {
        set_search_paths(to_strings(package_roots), to_strings(device_headers), to_strings({compiler}).front());
      },
      "package_roots"_a, "device_headers"_a, "compiler"_a);
  m.def("set_exporter", &set_exporter, "exporter"_a);
}
