#include "image/nvrtc.hpp"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <filesystem>
#include <mutex>
#include <string_view>
#include <utility>

#include "flashcute/error.hpp"
#include "system/environment.hpp"
#include "system/shared_library.hpp"

namespace flashcute {
namespace {

namespace fs = std::filesystem;

// ---- NVRTC's C interface: our own prototypes, because a machine without a toolkit has no nvrtc.h --------------------

using Program = struct OpaqueProgram*;
using Result = int;  // an enum in C; 0 is success

struct Nvrtc {
  explicit Nvrtc(SharedLibrary opened)
      : library(std::move(opened)),
        version(library.symbol<decltype(version)>("nvrtcVersion")),
        error_string(library.symbol<decltype(error_string)>("nvrtcGetErrorString")),
        num_archs(library.symbol<decltype(num_archs)>("nvrtcGetNumSupportedArchs")),
        archs(library.symbol<decltype(archs)>("nvrtcGetSupportedArchs")),
        create(library.symbol<decltype(create)>("nvrtcCreateProgram")),
        destroy(library.symbol<decltype(destroy)>("nvrtcDestroyProgram")),
        compile(library.symbol<decltype(compile)>("nvrtcCompileProgram")),
        log_size(library.symbol<decltype(log_size)>("nvrtcGetProgramLogSize")),
        log(library.symbol<decltype(log)>("nvrtcGetProgramLog")),
        cubin_size(library.symbol<decltype(cubin_size)>("nvrtcGetCUBINSize")),
        cubin(library.symbol<decltype(cubin)>("nvrtcGetCUBIN")),
        ptx_size(library.symbol<decltype(ptx_size)>("nvrtcGetPTXSize")),
        ptx(library.symbol<decltype(ptx)>("nvrtcGetPTX")) {
    check(version(&major, &minor), "nvrtcVersion");
  }

  using GetSize = Result (*)(Program, std::size_t*);
  using GetText = Result (*)(Program, char*);

  SharedLibrary library;
  Result (*version)(int* major, int* minor);
  char const* (*error_string)(Result);
  Result (*num_archs)(int* count);
  Result (*archs)(int* archs);
  Result (*create)(Program*, char const* source, char const* name, int headers, char const* const* texts,
                   char const* const* names);
  Result (*destroy)(Program*);
  Result (*compile)(Program, int count, char const* const* options);
  GetSize log_size;
  GetText log;
  GetSize cubin_size;
  GetText cubin;
  GetSize ptx_size;
  GetText ptx;
  int major = 0;
  int minor = 0;

  std::string version_text() const { return std::to_string(major) + "." + std::to_string(minor); }

  void check(Result result, char const* call) const {
    if (result != 0) throw CompileError(std::string(call) + " failed: " + error_string(result));
  }

  std::string text(Program program, GetSize size_of, GetText get, char const* call) const {
    std::size_t size = 0;
    check(size_of(program, &size), call);
    std::string bytes(size, '\0');
    if (size > 0) check(get(program, bytes.data()), call);
    return bytes;
  }

  std::vector<int> supported_archs() const {
    int count = 0;
    check(num_archs(&count), "nvrtcGetNumSupportedArchs");
    std::vector<int> list(static_cast<std::size_t>(count));
    check(archs(list.data()), "nvrtcGetSupportedArchs");
    return list;
  }
};

// ---- finding it ----------------------------------------------------------------------------------

/// Where CUDA toolkits may be installed, in the order of the search.
std::vector<std::string> toolkit_folders() {
  std::vector<std::string> folders;
  for (char const* variable : {"CUDA_HOME", "CUDA_PATH"}) {
    if (std::string folder = environment_value(variable); !folder.empty()) folders.push_back(std::move(folder));
  }
  folders.push_back("/usr/local/cuda");
  return folders;
}

std::vector<std::string> library_candidates(std::vector<std::string> const& roots) {
  if (std::string const chosen = env("FLASHCUTE_NVRTC"); !chosen.empty()) return {chosen};
  std::vector<std::string> candidates;
  for (std::string const& root : roots) {
    candidates.push_back(root + "/nvidia/cu13/lib/libnvrtc.so.13");
    candidates.push_back(root + "/nvidia/cuda_nvrtc/lib/libnvrtc.so.13");
    candidates.push_back(root + "/nvidia/cuda_nvrtc/lib/libnvrtc.so.12");
  }
  candidates.insert(candidates.end(), {"libnvrtc.so.13", "libnvrtc.so.12"});
  for (std::string const& toolkit : toolkit_folders()) {
    candidates.push_back(toolkit + "/lib64/libnvrtc.so.13");
    candidates.push_back(toolkit + "/lib64/libnvrtc.so.12");
  }
  return candidates;
}

/// NVRTC opens libnvrtc-builtins by its soname, which the loader does not find in a Python package, whose libraries
/// have no RUNPATH. If it was opened before by its path, the loader finds it. If the file does not exist, the
/// compiler's log says so.
void open_builtins(Nvrtc const& nvrtc) {
  fs::path const folder = fs::path(nvrtc.library.path()).parent_path();
  SharedLibrary::open({(folder / ("libnvrtc-builtins.so." + nvrtc.version_text())).string()});
}

struct Search {
  std::optional<Nvrtc> found;
  std::string problem;
};

Search search(std::vector<std::string> const& roots) {
  std::string tried;
  for (std::string const& candidate : library_candidates(roots)) {
    std::string reason;
    try {
      if (auto library = SharedLibrary::open({candidate}, &reason)) {
        Nvrtc nvrtc(*library);
        // 12.8 is the oldest toolkit we support.
        if (std::pair(nvrtc.major, nvrtc.minor) >= std::pair(12, 8)) {
          open_builtins(nvrtc);
          return {std::move(nvrtc), ""};
        }
        reason = nvrtc.library.path() + " is NVRTC " + nvrtc.version_text() + ", 12.8 or newer is needed\n";
      }
    } catch (Error const& e) {
      reason = e.what() + std::string("\n");
    }
    tried += "  " + reason;
  }
  std::string what = "NVRTC, the run-time compiler, was not found: install it with `" + install_command() +
                     "`, or set FLASHCUTE_NVRTC to the path of a libnvrtc.so";
  if (std::string const chosen = env("FLASHCUTE_NVRTC"); !chosen.empty()) {
    what = "NVRTC, the run-time compiler, cannot be used from FLASHCUTE_NVRTC='" + chosen +
           "': correct it, or unset it and install one with `" + install_command() + "`";
  }
  return {std::nullopt, what + ". Tried:\n" + tried};
}

/// Search roots and the result of the search. A library that was found stays for the process; after a failure the
/// search runs again when the roots or FLASHCUTE_NVRTC have changed.
struct Registry {
  std::mutex mutex;
  std::vector<std::string> roots;
  std::string searched_for;
  bool searched = false;
  Search result;
};

Registry& registry() {
  static Registry r;
  return r;
}

/// The compiler, or null with the reason in `problem`.
Nvrtc const* find_nvrtc(std::string* problem) {
  Registry& r = registry();
  std::lock_guard const guard(r.mutex);
  if (!r.result.found && (!r.searched || r.searched_for != env("FLASHCUTE_NVRTC"))) {
    r.searched_for = env("FLASHCUTE_NVRTC");
    r.result = search(r.roots);
    r.searched = true;
  }
  if (problem != nullptr) *problem = r.result.problem;
  return r.result.found ? &*r.result.found : nullptr;
}

Nvrtc const& nvrtc() {
  std::string problem;
  Nvrtc const* const found = find_nvrtc(&problem);
  if (found == nullptr) throw UnsupportedError(problem);
  return *found;
}

// ---- compiling -----------------------------------------------------------------------------------

class ProgramOwner {
 public:
  ProgramOwner(Nvrtc const& nvrtc, std::string const& source, std::string const& name) : nvrtc_(nvrtc) {
    nvrtc.check(nvrtc.create(&program_, source.c_str(), name.c_str(), 0, nullptr, nullptr), "nvrtcCreateProgram");
  }
  ProgramOwner(ProgramOwner const&) = delete;
  ProgramOwner& operator=(ProgramOwner const&) = delete;
  ~ProgramOwner() { nvrtc_.destroy(&program_); }
  Program get() const { return program_; }

 private:
  Nvrtc const& nvrtc_;
  Program program_ = nullptr;
};

Result compile(Nvrtc const& nvrtc, Program program, std::vector<std::string> const& options) {
  std::vector<char const*> pointers;
  for (std::string const& option : options) pointers.push_back(option.c_str());
  return nvrtc.compile(program, static_cast<int>(pointers.size()), pointers.data());
}

std::string log_of(Nvrtc const& nvrtc, Program program) {
  std::string log = nvrtc.text(program, nvrtc.log_size, nvrtc.log, "nvrtcGetProgramLog");
  while (!log.empty() && (log.back() == '\0' || log.back() == '\n')) log.pop_back();
  return log;
}

std::string joined(std::vector<std::string> const& words) {
  std::string text;
  for (std::string const& word : words) text += (text.empty() ? "" : " ") + word;
  return text;
}

/// Throws unless `arch` is "sm_" and a number that NVRTC knows, with or without the suffix of a feature set (sm_90a).
void check_arch(Nvrtc const& nvrtc, std::string const& arch) {
  std::vector<int> const known = nvrtc.supported_archs();
  int number = 0;
  if (arch.starts_with("sm_")) {
    auto const [end, error] = std::from_chars(arch.data() + 3, arch.data() + arch.size(), number);
    std::string_view const suffix(end, static_cast<std::size_t>(arch.data() + arch.size() - end));
    bool const well_formed = error == std::errc() && (suffix.empty() || suffix == "a" || suffix == "f");
    if (well_formed && std::find(known.begin(), known.end(), number) != known.end()) return;
  }
  std::vector<std::string> names;
  for (int const a : known) names.push_back("sm_" + std::to_string(a));
  throw CompileError("NVRTC " + nvrtc.version_text() + " (" + nvrtc.library.path() +
                     ") does not know the architecture '" + arch + "'. It knows " + joined(names) +
                     ". A newer GPU needs a newer NVRTC");
}

}  // namespace

std::string install_command() { return FLASHCUTE_INSTALL_COMMAND; }

void set_search_roots(std::vector<std::string> roots) {
  Registry& r = registry();
  std::lock_guard const guard(r.mutex);
  r.roots = std::move(roots);
  r.searched = false;
}

bool nvrtc_available() { return find_nvrtc(nullptr) != nullptr; }

std::string nvrtc_problem() {
  std::string problem;
  find_nvrtc(&problem);
  return problem;
}

std::string nvrtc_version() { return nvrtc().version_text(); }

std::string nvrtc_path() { return nvrtc().library.path(); }

std::string nvrtc_build() {
  // nvrtcVersion leaves out the patch level, but the comments at the head of any PTX name it and the build. An empty
  // program takes 20 ms, once; hashing the 100 MB of the library would take longer.
  static std::string const signature = [] {
    Nvrtc const& n = nvrtc();
    ProgramOwner const program(n, "", "signature.cu");
    std::string const arch = "compute_" + std::to_string(n.supported_archs().at(0));
    if (compile(n, program.get(), {"--gpu-architecture=" + arch}) != 0) {
      throw CompileError("NVRTC " + n.version_text() + " (" + n.library.path() +
                         ") does not work: " + log_of(n, program.get()));
    }
    std::string const ptx = n.text(program.get(), n.ptx_size, n.ptx, "nvrtcGetPTX");
    return ptx.substr(0, ptx.find("\n."));  // up to the first directive
  }();
  return signature;
}

void require_nvrtc_knows(std::string const& arch) { check_arch(nvrtc(), arch); }

std::optional<std::string> cuda_include_folder() {
  auto const complete = [](std::string const& folder) {
    std::error_code ignored;
    return fs::is_regular_file(fs::path(folder) / "cuda_fp16.h", ignored);
  };
  if (std::string const chosen = env("FLASHCUTE_CUDA_INCLUDE"); !chosen.empty()) {
    if (complete(chosen)) return chosen;
    throw ArgumentError("environment variable FLASHCUTE_CUDA_INCLUDE", "a folder that holds cuda_fp16.h",
                        "'" + chosen + "'");
  }
  std::vector<std::string> candidates;
  // First the headers that came with the compiler: those of another version may not match it.
  if (Nvrtc const* const found = find_nvrtc(nullptr)) {
    candidates.push_back((fs::path(found->library.path()).parent_path().parent_path() / "include").string());
  }
  Registry& r = registry();
  {
    std::lock_guard const guard(r.mutex);
    for (std::string const& root : r.roots) {
      candidates.push_back(root + "/nvidia/cu13/include");
      candidates.push_back(root + "/nvidia/cuda_runtime/include");
    }
  }
  for (std::string const& toolkit : toolkit_folders()) candidates.push_back(toolkit + "/include");
  auto const found = std::find_if(candidates.begin(), candidates.end(), complete);
  return found == candidates.end() ? std::nullopt : std::optional(*found);
}

std::vector<std::string> options_without_paths(CompileRequest const& request) {
  // diag-suppress: flashcute's and CuTe's headers have constexpr functions without __device__, for constant
  // expressions. NVRTC reports error 20217 for each; without that error a call at run time still fails, in ptxas.
  // -default-device would make device functions of them, but also a device variable of every constant in a namespace,
  // with a symbol in the image (docs/decisions/0012-compile-cost.md).
  // CCCL_DISABLE_FP16_SUPPORT: numeric_limits of CUDA's narrow types would be such variables too, and no kernel needs
  // them.
  // no-source-include: otherwise NVRTC searches the current directory for headers first.
  std::vector<std::string> options = {
      "--gpu-architecture=" + request.arch, "-std=c++20", "--diag-suppress=20217", "-no-source-include", "-DNDEBUG",
      "-DCCCL_DISABLE_FP16_SUPPORT"};
  options.insert(options.end(), request.options.begin(), request.options.end());
  return options;
}

std::string nvrtc_compile(CompileRequest const& request) {
  Nvrtc const& n = nvrtc();
  check_arch(n, request.arch);
  std::vector<std::string> options = options_without_paths(request);
  for (std::string const& folder : request.include_folders) options.push_back("--include-path=" + folder);

  ProgramOwner const program(n, request.source, request.name + ".cu");
  Result const result = compile(n, program.get(), options);
  // After a failed compilation nvrtcGetCUBINSize still succeeds, with size 0: the image is valid only if the result,
  // the size and the first bytes are right.
  std::string image;
  if (result == 0) image = n.text(program.get(), n.cubin_size, n.cubin, "nvrtcGetCUBIN");
  if (!image.starts_with("\x7f"
                         "ELF")) {
    throw CompileError("NVRTC " + n.version_text() + " could not compile " + request.name + " for " + request.arch +
                       " (" + (result == 0 ? "it returned no ELF image" : n.error_string(result)) + ").\n" +
                       log_of(n, program.get()) + "\nOptions: " + joined(options));
  }
  return image;
}

}  // namespace flashcute
