// What Python is told: why a call runs what it runs, and what the build, the machine and the disk cache have.
#include <tuple>

#include "bind.hpp"
#include "gil.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace flashcute::python {
namespace {

/// Names of folders, as os.fsencode gives them: they need not be text.
std::vector<std::string> to_strings(std::vector<nb::bytes> const& paths) {
  std::vector<std::string> strings;
  for (nb::bytes const& path : paths) strings.emplace_back(path.c_str(), path.size());
  return strings;
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
             "'sm90' (Hopper's kernels), 'sm80' (the mma.sync kernels of every GPU), 'cpu', or '' if nothing computes "
             "the gradients."},
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

void bind_machine(nb::module_& m) {
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

void bind_facts(nb::module_& m) {
  bind_explanations(m);
  bind_machine(m);
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
}

}  // namespace flashcute::python
