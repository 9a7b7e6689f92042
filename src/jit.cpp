#include "jit.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <map>
#include <mutex>
#include <set>
#include <span>
#include <string_view>
#include <utility>

#include "disk_cache.hpp"
#include "environment.hpp"
#include "flashcute/error.hpp"
#include "header_hash.hpp"
#include "nvrtc.hpp"
#include "sha256.hpp"

namespace flashcute {
namespace {

// ---- the headers ---------------------------------------------------------------------------------

/// The folders of our headers, and what they and the toolkit's held when they were first asked for: each folder is read
/// once per process.
struct Headers {
  std::mutex mutex;
  std::vector<std::string> folders;
  std::map<std::string, std::string> contents;  // folder -> hash
  std::map<std::string, std::string> sizes;
  std::set<std::pair<Arch, std::string>> complete;  // with all that it takes to compile, by FLASHCUTE_CUDA_INCLUDE
};

Headers& headers() {
  static Headers h;
  return h;
}

std::vector<std::string> our_folders() {
  Headers& h = headers();
  std::lock_guard const guard(h.mutex);
  if (h.folders.empty()) {
    throw UnsupportedError(
        "Compiling at run time needs the folder of flashcute's headers: set_include_folders has to name it before");
  }
  return h.folders;
}

std::string hash_once(std::map<std::string, std::string> Headers::* known, std::string const& folder,
                      std::string (*hash)(std::filesystem::path const&)) {
  Headers& h = headers();
  std::lock_guard const guard(h.mutex);
  std::string& result = (h.*known)[folder];
  if (result.empty()) result = hash(folder);
  return result;
}

// ---- what is compiled ----------------------------------------------------------------------------

std::string toolkit_folder() {
  if (auto folder = cuda_include_folder()) return *folder;
  throw UnsupportedError("Compiling at run time needs cuda_fp16.h, which was not found: install it with `" +
                         install_command() + "`, or set FLASHCUTE_CUDA_INCLUDE to the folder that holds it");
}

CompileRequest request_for(KernelCode const& kernel, Arch arch) {
  CompileRequest request;
  request.name = kernel.name;
  request.source = kernel.source;
  request.arch = target_of(kernel, arch);
  request.include_folders = our_folders();
  if (kernel.arch_specific) {
    // CuTe names the files with Hopper's products of any width relative to its own, where NVRTC shall not look.
    std::string const root = request.include_folders.at(0);
    for (char const* folder : {"/cute/arch", "/cute/atom"}) {
      if (std::filesystem::exists(root + folder)) request.include_folders.push_back(root + folder);
    }
  }
  request.include_folders.push_back(toolkit_folder());
  return request;
}

/// The folders with our headers; the toolkit's, which comes last, is left out.
std::span<std::string const> ours_in(CompileRequest const& request) {
  return std::span(request.include_folders).first(request.include_folders.size() - 1);
}

// In the name of an image, before the compiler's version.
constexpr char const* compiler_mark = ".nvrtc";

std::string key_of(CompileRequest const& request) {
  Sha256 hash;
  // Each part is preceded by its length: no two lists of parts spell the same text.
  auto const add = [&](std::string_view part) {
    hash.update(std::to_string(part.size()) + ":");
    hash.update(part);
  };
  add(request.source);
  add(nvrtc_version());
  add(nvrtc_build());
  for (std::string const& option : options_without_paths(request)) add(option);
  for (std::string const& folder : ours_in(request)) add(hash_once(&Headers::contents, folder, hash_of_contents));
  add(hash_once(&Headers::sizes, request.include_folders.back(), hash_of_sizes));
  return request.name + "." + request.arch + compiler_mark + nvrtc_version() + "." + hash.hex();
}

/// Somebody edits headers while a process runs: its images would be published under the hash of the old text.
void check_unchanged(CompileRequest const& request) {
  for (std::string const& folder : ours_in(request)) {
    if (hash_of_contents(folder) == hash_once(&Headers::contents, folder, hash_of_contents)) continue;
    throw CompileError("The headers in " + folder +
                       " have changed since this process first read them. Start the "
                       "process again: it then compiles the new text");
  }
}

// ---- the progress line ---------------------------------------------------------------------------

/// "flashcute: compiling ... 12.3 s" on stderr. The line stays open while the compiler works; if another thread starts
/// one meanwhile, it breaks this line, whose end then names the kernel again.
class ProgressLine {
 public:
  ProgressLine(CompileRequest const& request, std::filesystem::path const& cache)
      : kernel_(request.name), silent_(quiet()), start_(std::chrono::steady_clock::now()) {
    if (silent_) return;
    std::lock_guard const guard(mutex_);
    std::fprintf(stderr, "%sflashcute: compiling %s for %s with NVRTC %s (once; cached in %s) ...",
                 open_line_ != nullptr ? "\n" : "", kernel_.c_str(), request.arch.c_str(), nvrtc_version().c_str(),
                 cache.c_str());
    open_line_ = this;
  }
  ProgressLine(ProgressLine const&) = delete;
  ProgressLine& operator=(ProgressLine const&) = delete;

  ~ProgressLine() {
    if (silent_) return;
    std::chrono::duration<double> const seconds = std::chrono::steady_clock::now() - start_;
    char const* const failed = std::uncaught_exceptions() > 0 ? " failed after" : "";
    std::lock_guard const guard(mutex_);
    if (open_line_ != this) {
      std::fprintf(stderr, "%sflashcute: %s", open_line_ != nullptr ? "\n" : "", kernel_.c_str());
    }
    std::fprintf(stderr, "%s %.1f s\n", failed, seconds.count());
    open_line_ = nullptr;
  }

 private:
  static inline std::mutex mutex_;
  static inline ProgressLine const* open_line_ = nullptr;

  std::string kernel_;
  bool silent_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace

void set_include_folders(std::vector<std::string> folders) {
  Headers& h = headers();
  std::lock_guard const guard(h.mutex);
  h.folders = std::move(folders);
  h.contents.clear();
  h.complete.clear();
}

std::string jit_key(KernelCode const& kernel, Arch arch) { return key_of(request_for(kernel, arch)); }

JitKeyParts parts_of_jit_key(std::string_view key) {
  std::string_view const names = key.substr(0, key.rfind('.'));  // without the hash
  auto const target = std::min(names.find('.'), names.size());
  auto const compiler = std::min(names.find(compiler_mark, target), names.size());
  JitKeyParts parts{std::string(names.substr(0, target)), "", ""};
  if (target < compiler) parts.target = names.substr(target + 1, compiler - target - 1);
  if (compiler < names.size()) {
    parts.compiler = "NVRTC " + std::string(names.substr(compiler + std::string_view(compiler_mark).size()));
  }
  return parts;
}

bool can_compile(Arch arch) {
  if (jit_mode() == JitMode::off || !nvrtc_available()) return false;
  Headers& h = headers();
  std::pair const place{arch, env("FLASHCUTE_CUDA_INCLUDE")};
  {
    std::lock_guard const guard(h.mutex);
    if (h.complete.contains(place)) return true;
  }
  if (!compile_problem(arch).empty()) return false;
  std::lock_guard const guard(h.mutex);
  h.complete.insert(place);
  return true;
}

std::string compile_problem(Arch arch) {
  if (jit_mode() == JitMode::off) return "FLASHCUTE_JIT=off";
  try {
    require_nvrtc_knows(target_of(arch));
    our_folders();
    toolkit_folder();
  } catch (Error const& error) {
    return error.what();
  }
  return "";
}

JitImage jit_image(KernelCode const& kernel, Arch arch) {
  if (jit_mode() == JitMode::off) {
    throw UnsupportedError(
        "There is no ahead-of-time image of " + kernel.name + " for " + target_of(kernel, arch) +
        ", and FLASHCUTE_JIT=off forbids to compile one. Set FLASHCUTE_JIT=on: it also allows images that "
        "`python -m flashcute compile` made beforehand, which keeps the wait out of the program");
  }
  CompileRequest const request = request_for(kernel, arch);
  DiskCache const cache(cache_folder(), cache_limit());
  auto const compile = [&] {
    ProgressLine const line(request, cache.folder());
    std::string image = nvrtc_compile(request);
    check_unchanged(request);
    return image;
  };
  JitImage image;
  image.bytes = cache.get_or_build(key_of(request), compile, &image.compiled);
  return image;
}

}  // namespace flashcute
