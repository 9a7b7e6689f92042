// The functions that take arrays: turns array objects into TensorViews.
#include <array>
#include <iterator>
#include <tuple>

#include "bind.hpp"
#include "dlpack.hpp"
#include "gil.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace flashcute::python {

/// (batch, heads, seqlen_q, seqlen_k)
using BlockMaskSizes = std::tuple<int64_t, int64_t, int64_t, int64_t>;

BlockMask block_mask_of(TensorView const* words, BlockMaskSizes const& sizes) {
  auto const& [batch, heads, seqlen_q, seqlen_k] = sizes;
  return {words, batch, heads, seqlen_q, seqlen_k};
}

/// CallOptions as Python has them: without a stream, q's library says on which one a call on a GPU runs.
struct PythonOptions {
  CallOptions options;  // without arrays
  std::optional<std::uintptr_t> stream;
  nb::handle seqlens_q, seqlens_k, prefixes, sink, cu_seqlens_q, cu_seqlens_k, block_mask;
  std::optional<BlockMaskSizes> block_mask_sizes;

  /// What a tensor's library is told when it exports q.
  nb::object stream_object() const { return stream ? nb::object(nb::int_(*stream)) : nb::none(); }
};

// The members of the tuple Options of _call.py. Python makes one in every call, so it is read by position.
constexpr std::array option_names = {
    "causal",          "diagonal",         "scale",       "layout",       "stream",       "allow_tf32",
    "deterministic",   "gradients_follow", "window_left", "window_right", "seqlens_q",    "seqlens_k",
    "prefix",          "prefixes",         "sink",        "cu_seqlens_q", "cu_seqlens_k", "block_mask",
    "block_mask_sizes"};

}  // namespace flashcute::python

template <>
struct nanobind::detail::type_caster<flashcute::python::PythonOptions> {
  // Not by its name: nanobind's stubgen imports the module of a dotted name, here an installed flashcute beside the
  // module that is being built, and fails.
  NB_TYPE_CASTER(flashcute::python::PythonOptions, const_name("tuple[object, ...]"))

  bool from_python(handle source, uint8_t, cleanup_list*) noexcept {
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != std::ssize(flashcute::python::option_names)) {
      return false;
    }
    flashcute::CallOptions& o = value.options;
    Py_ssize_t next = 0;
    auto const item = [&] { return handle(PyTuple_GET_ITEM(source.ptr(), next++)); };
    return read(item(), o.causal) && read(item(), o.diagonal) && read(item(), o.scale) && read(item(), o.layout) &&
           read(item(), value.stream) && read(item(), o.allow_tf32) && read(item(), o.deterministic) &&
           read(item(), o.gradients_follow) && read(item(), o.window_left) && read(item(), o.window_right) &&
           read(item(), value.seqlens_q) && read(item(), value.seqlens_k) && read(item(), o.prefix) &&
           read(item(), value.prefixes) && read(item(), value.sink) && read(item(), value.cu_seqlens_q) &&
           read(item(), value.cu_seqlens_k) && read(item(), value.block_mask) && read(item(), value.block_mask_sizes);
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

  static bool read(handle object, handle& array) {
    array = object;
    return true;
  }

  template <class Value>
  static bool read(handle object, std::optional<Value>& option) {
    return object.is_none() || try_cast(object, option);
  }
};

namespace flashcute::python {
namespace {

/// q's library says on which stream a call on a GPU runs, unless the caller does: sets `launch_stream`, and returns
/// what the libraries of the other arrays are told.
nb::object choose_stream(Tensor const& q, PythonOptions const& options, void*& launch_stream) {
  if (q.view().device.type == DeviceType::cpu) return options.stream_object();
  launch_stream = options.stream ? reinterpret_cast<void*>(*options.stream) : q.current_stream();
  return nb::int_(reinterpret_cast<std::uintptr_t>(launch_stream));
}

/// The arrays among the options, as tensors to which `options` points.
class OptionTensors {
 public:
  /// `stream`: what their libraries are told. `launches`: work on them will be launched on `options.stream`.
  OptionTensors(PythonOptions const& given, nb::handle stream, CallOptions& options, bool launches) {
    for (auto const& [argument, dtypes, array, tensor, view] :
         {std::tuple{"seqlens_q", "int32", given.seqlens_q, &seqlens_q_, &options.seqlens_q},
          std::tuple{"seqlens_k", "int32", given.seqlens_k, &seqlens_k_, &options.seqlens_k},
          std::tuple{"cu_seqlens_q", "int32", given.cu_seqlens_q, &cu_seqlens_q_, &options.cu_seqlens_q},
          std::tuple{"cu_seqlens_k", "int32", given.cu_seqlens_k, &cu_seqlens_k_, &options.cu_seqlens_k},
          std::tuple{"prefix", "int32", given.prefixes, &prefixes_, &options.prefixes},
          std::tuple{"sink", "float32 or q's", given.sink, &sink_, &options.sink}}) {
      if (array.is_none()) continue;
      tensor->emplace(argument, array, stream, dtypes);
      *view = &(*tensor)->view();
      if (launches && !given.stream) (*tensor)->require_stream(argument, options.stream);
    }
    if (!given.block_mask.is_none() && given.block_mask_sizes) {
      block_mask_.emplace("block_mask", given.block_mask, stream, "int32");
      options.block_mask = block_mask_of(&block_mask_->view(), *given.block_mask_sizes);
      if (launches && !given.stream) block_mask_->require_stream("block_mask", options.stream);
    }
  }
  OptionTensors(OptionTensors const&) = delete;
  OptionTensors& operator=(OptionTensors const&) = delete;

 private:
  std::optional<Tensor> seqlens_q_, seqlens_k_, cu_seqlens_q_, cu_seqlens_k_, prefixes_, sink_, block_mask_;
};

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
  OptionTensors const held(given, launch_stream, options, true);
  ReleaseGil const released;
  forward(optional_of(config), tq.view(), tk->view(), tv->view(), to->view(), tl ? &tl->view() : nullptr, options,
          tc ? &tc->view() : nullptr);
}

void call_backward(BackwardConfig const* config, nb::handle dout, nb::handle q, nb::handle k, nb::handle v,
                   nb::handle out, nb::handle lse, nb::handle dlse, nb::handle dq, nb::handle dk, nb::handle dv,
                   nb::handle dsink, nb::handle workspace, PythonOptions const& given) {
  CallOptions options = given.options;
  Tensor const tq("q", q, given.stream_object());
  nb::object const launch_stream = choose_stream(tq, given, options.stream);
  std::optional<Tensor> tdout, tk, tv, to, tlse, tdlse, tdq, tdk, tdv, ts, tw;
  for (auto const& [argument, t, array] :
       {std::tuple{"dout", &tdout, dout}, std::tuple{"k", &tk, k}, std::tuple{"v", &tv, v}, std::tuple{"out", &to, out},
        std::tuple{"lse", &tlse, lse}, std::tuple{"dlse", &tdlse, dlse}, std::tuple{"dq", &tdq, dq},
        std::tuple{"dk", &tdk, dk}, std::tuple{"dv", &tdv, dv}, std::tuple{"dsink", &ts, dsink},
        std::tuple{"workspace", &tw, workspace}}) {
    bool const optional = t == &tdlse || t == &ts || t == &tw;
    if (optional && array.is_none()) continue;
    t->emplace(argument, array, launch_stream);
    if (!given.stream) (*t)->require_stream(argument, options.stream);
  }
  OptionTensors const held(given, launch_stream, options, true);
  ReleaseGil const released;
  backward(optional_of(config), tdout->view(), tq.view(), tk->view(), tv->view(), to->view(), tlse->view(),
           tdlse ? &tdlse->view() : nullptr, tdq->view(), tdk->view(), tdv->view(), options, tw ? &tw->view() : nullptr,
           ts ? &ts->view() : nullptr);
}

int64_t call_backward_workspace_size(BackwardConfig const* config, nb::handle q, nb::handle v,
                                     PythonOptions const& given) {
  CallOptions options = given.options;
  Tensor const tq("q", q, nb::none()), tv("v", v, nb::none());
  OptionTensors const held(given, nb::none(), options, false);
  ReleaseGil const released;
  return backward_workspace_size(optional_of(config), tq.view(), tv.view(), options);
}

BackwardConfig call_backward_config_for(nb::handle q, nb::handle k, nb::handle v, PythonOptions const& given) {
  Tensor const tq("q", q, nb::none()), tk("k", k, nb::none()), tv("v", v, nb::none());
  CallOptions options = given.options;
  OptionTensors const held(given, nb::none(), options, false);
  ReleaseGil const released;
  return backward_config_for(tq.view(), tk.view(), tv.view(), {}, options);
}

Explanation call_explain(ForwardConfig const* config, nb::handle q, nb::handle k, nb::handle v, nb::handle out,
                         PythonOptions const& given) {
  Tensor const tq("q", q, nb::none()), tk("k", k, nb::none()), tv("v", v, nb::none());
  if (tq.view().dtype == ElementType::int32) {
    throw ArgumentError("q", "dtype float16, bfloat16, float32 or float64", "int32");
  }
  std::optional<Tensor> to;
  if (!out.is_none()) to.emplace("out", out, nb::none());
  CallOptions options = given.options;
  OptionTensors const held(given, nb::none(), options, false);
  ReleaseGil const released;
  return explain(optional_of(config), tq.view(), tk.view(), tv.view(), options, to ? &to->view() : nullptr);
}

/// A mask that another is made from.
using BlockMaskParts = std::optional<std::pair<nb::object, BlockMaskSizes>>;

void call_build_block_mask(nb::handle words, BlockMaskSizes const& sizes, nb::handle dense, nb::handle documents_q,
                           nb::handle documents_k, BlockMaskParts const& first, BlockMaskParts const& second,
                           std::string const& operation, std::optional<std::uintptr_t> stream) {
  PythonOptions given;
  given.stream = stream;
  void* launch_stream = nullptr;
  Tensor const to("block_mask", words, given.stream_object(), "int32");
  nb::object const told = choose_stream(to, given, launch_stream);
  std::optional<Tensor> held[5];
  BlockMaskRules rules;
  auto const hold = [&](std::optional<Tensor>& tensor, char const* argument, nb::handle array, char const* dtypes) {
    if (array.is_none()) return static_cast<TensorView const*>(nullptr);
    tensor.emplace(argument, array, told, dtypes);
    if (!stream) tensor->require_stream(argument, launch_stream);
    return &tensor->view();
  };
  rules.dense = hold(held[0], "attn_mask", dense, "bool");
  rules.documents_q = hold(held[1], "documents", documents_q, "int32");
  rules.documents_k = hold(held[2], "documents", documents_k, "int32");
  if (first) rules.first = block_mask_of(hold(held[3], "block_mask", first->first, "int32"), first->second);
  if (second) rules.second = block_mask_of(hold(held[4], "block_mask", second->first, "int32"), second->second);
  using Operation = BlockMaskRules::Operation;
  rules.operation = operation == "either"       ? Operation::either
                    : operation == "first_only" ? Operation::first_only
                                                : Operation::both;
  ReleaseGil const released;
  build_block_mask(block_mask_of(&to.view(), sizes), rules, launch_stream);
}

}  // namespace

void bind_calls(nb::module_& m) {
  m.def(
      "block_mask_size",
      [](BlockMaskSizes const& sizes, std::optional<int64_t> partial_cells) {
        return block_mask_size(block_mask_of(nullptr, sizes), partial_cells);
      },
      "sizes"_a, "partial_cells"_a.none() = nb::none());
  m.def("build_block_mask", &call_build_block_mask, "words"_a, "sizes"_a, "dense"_a.none() = nb::none(),
        "documents_q"_a.none() = nb::none(), "documents_k"_a.none() = nb::none(), "first"_a.none() = nb::none(),
        "second"_a.none() = nb::none(), "operation"_a = "both", "stream"_a.none() = nb::none());
  m.def("option_names", [] { return std::vector<std::string>(option_names.begin(), option_names.end()); });
  m.def("forward", &call_forward, "config"_a.none(), "q"_a.none(), "k"_a.none(), "v"_a.none(), "out"_a.none(),
        "lse"_a.none(), "block_counts"_a.none(), "options"_a);
  m.def("backward", &call_backward, "config"_a.none(), "dout"_a.none(), "q"_a.none(), "k"_a.none(), "v"_a.none(),
        "out"_a.none(), "lse"_a.none(), "dlse"_a.none(), "dq"_a.none(), "dk"_a.none(), "dv"_a.none(), "dsink"_a.none(),
        "workspace"_a.none(), "options"_a);
  m.def("backward_workspace_size", &call_backward_workspace_size, "config"_a.none(), "q"_a.none(), "v"_a.none(),
        "options"_a);
  m.def("backward_config_for", &call_backward_config_for, "q"_a.none(), "k"_a.none(), "v"_a.none(), "options"_a);
  m.def(
      "check_problem",
      [](nb::handle q, nb::handle k, nb::handle v, PythonOptions const& given) {
        Tensor const tq("q", q, nb::none()), tk("k", k, nb::none()), tv("v", v, nb::none());
        CallOptions options = given.options;
        OptionTensors const held(given, nb::none(), options, false);
        check_problem(tq.view(), tk.view(), tv.view(), options);
      },
      "q"_a.none(), "k"_a.none(), "v"_a.none(), "options"_a);
  m.def("explain", &call_explain, "config"_a.none(), "q"_a.none(), "k"_a.none(), "v"_a.none(), "out"_a.none(),
        "options"_a);
  m.def("set_exporter", &set_exporter, "exporter"_a);
}

}  // namespace flashcute::python
