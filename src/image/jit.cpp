#include "image/jit.hpp"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <map>
#include <mutex>
#include <set>
#include <span>
#include <string_view>
#include <utility>

#include "flashcute/error.hpp"
#include "image/compile_jobs.hpp"
#include "image/compiler_process.hpp"
#include "image/disk_cache.hpp"
#include "image/header_hash.hpp"
#include "image/nvrtc.hpp"
#include "image/sha256.hpp"
#include "image/workers.hpp"
#include "system/environment.hpp"

namespace flashcute {
namespace {

// ---- the headers ---------------------------------------------------------------------------------

/// The folders of flashcute's headers, and the hashes of these and of the toolkit's folder: each folder is read once
/// per process.
struct Headers {
  std::mutex mutex;
  std::vector<std::string> folders;
  std::map<std::string, std::string> contents;  // folder -> hash
  std::map<std::string, std::string> sizes;
  std::set<std::pair<Arch, std::string>> complete;  // targets, with FLASHCUTE_CUDA_INCLUDE, that can be compiled for
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
    // CuTe includes the files with WGMMA of any width by paths relative to its own, which NVRTC does not search with
    // -no-source-include.
    std::string const root = request.include_folders.at(0);
    for (char const* folder : {"/cute/arch", "/cute/atom"}) {
      if (std::filesystem::exists(root + folder)) request.include_folders.push_back(root + folder);
    }
  }
  request.include_folders.push_back(toolkit_folder());
  return request;
}

/// The folders with flashcute's headers: all but the last, the toolkit's.
std::span<std::string const> ours_in(CompileRequest const& request) {
  return std::span(request.include_folders).first(request.include_folders.size() - 1);
}

// Stands before the compiler's version in a cache key.
constexpr char const* compiler_mark = ".nvrtc";

/// The readable part of a cache key. It may be cut, because the hash after it includes the source, which has the whole
/// name. With 124 characters, the target, the compiler and the hash, a file name still has room for longer versions.
std::string readable_name(std::string const& name) {
  constexpr std::size_t longest = 124;
  constexpr std::string_view mark = "-etc";  // no kernel's own name has a hyphen
  return name.size() <= longest ? name : name.substr(0, longest - mark.size()).append(mark);
}

std::string key_of(CompileRequest const& request) {
  Sha256 hash;
  // Each part is preceded by its length, so no two lists of parts hash the same text.
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
  return readable_name(request.name) + "." + request.arch + compiler_mark + nvrtc_version() + "." + hash.hex();
}

/// If a user edits headers while a process runs, the image would be published under the hash of the old text.
void check_unchanged(CompileRequest const& request) {
  for (std::string const& folder : ours_in(request)) {
    if (hash_of_contents(folder) == hash_once(&Headers::contents, folder, hash_of_contents)) continue;
    throw CompileError("The headers in " + folder +
                       " have changed since this process first read them. Start the "
                       "process again: it then compiles the new text");
  }
}

// ---- the progress line ---------------------------------------------------------------------------

/// "flashcute: compiling NAME and 2 more ... 1 2 3, 8.1 s" on stderr, as soon as something is compiled. The line stays
/// open while compilers run; if another call begins a line meanwhile, the end of this one goes to a new line that names
/// the kernel again.
class ProgressLine {
 public:
  ProgressLine(std::string const& first_kernel, std::size_t kernels, std::string target, std::filesystem::path cache)
      : what_(first_kernel + (kernels > 1 ? " and " + std::to_string(kernels - 1) + " more" : "")),
        counts_(kernels > 1),
        target_(std::move(target)),
        cache_(std::move(cache)),
        silent_(quiet()) {}
  ProgressLine(ProgressLine const&) = delete;
  ProgressLine& operator=(ProgressLine const&) = delete;

  /// Called before each compilation; the first begins the line.
  void begin() {
    std::lock_guard const guard(mutex_);
    if (silent_ || begun_) return;
    begun_ = true;
    start_ = std::chrono::steady_clock::now();
    std::fprintf(stderr, "%sflashcute: compiling %s for %s with NVRTC %s (once; cached in %s) ...",
                 open_line_ != nullptr ? "\n" : "", what_.c_str(), target_.c_str(), nvrtc_version().c_str(),
                 cache_.c_str());
    open_line_ = this;
  }

  /// Called for each image, compiled or from the cache.
  void one_more() {
    std::lock_guard const guard(mutex_);
    ++done_;
    if (begun_ && counts_ && open_line_ == this) std::fprintf(stderr, " %d", done_);
  }

  void compiles_here(std::string const& why) {
    std::lock_guard const guard(mutex_);
    if (!begun_ || std::exchange(told_why_, true)) return;
    reopen();
    std::fprintf(stderr, " (in this process, one kernel at a time, as a process of the compiler cannot be started: %s)",
                 why.c_str());
  }

  ~ProgressLine() {
    if (!begun_) return;
    std::chrono::duration<double> const seconds = std::chrono::steady_clock::now() - start_;
    char const* const failed = std::uncaught_exceptions() > 0 ? " failed after" : counts_ ? "," : "";
    std::lock_guard const guard(mutex_);
    reopen();
    std::fprintf(stderr, "%s %.1f s\n", failed, seconds.count());
    open_line_ = nullptr;
  }

 private:
  void reopen() {
    if (open_line_ == this) return;
    std::fprintf(stderr, "%sflashcute: %s", open_line_ != nullptr ? "\n" : "", what_.c_str());
    open_line_ = this;
  }

  static inline std::mutex mutex_;
  static inline ProgressLine const* open_line_ = nullptr;

  std::string what_;
  bool counts_;
  std::string target_;
  std::filesystem::path cache_;
  bool silent_;
  bool begun_ = false;
  bool told_why_ = false;
  int done_ = 0;
  std::chrono::steady_clock::time_point start_;
};

// ---- compiling -----------------------------------------------------------------------------------

/// A slot for one compilation: at most `most` run at the same time in this process, over all calls.
class Job {
 public:
  explicit Job(int most) {
    std::unique_lock lock(mutex_);
    free_.wait(lock, [&] { return running_ < most; });
    ++running_;
  }
  Job(Job const&) = delete;
  Job& operator=(Job const&) = delete;
  ~Job() {
    std::lock_guard const guard(mutex_);
    --running_;
    free_.notify_all();
  }

 private:
  static inline std::mutex mutex_;
  static inline std::condition_variable free_;
  static inline int running_ = 0;
};

std::string compile(CompileRequest const& request, ProgressLine& line) {
  std::string why_not;
  auto image = compile_apart(request, why_not);
  if (!image) {
    line.compiles_here(why_not);
    image = nvrtc_compile(request);
  }
  check_unchanged(request);
  return *std::move(image);
}

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

bool is_cached(KernelCode const& kernel, Arch arch) { return DiskCache(cache_folder()).has(jit_key(kernel, arch)); }

std::vector<JitImage> jit_images(std::span<KernelCode const> kernels, Arch arch) {
  std::vector<JitImage> images(kernels.size());
  if (kernels.empty()) return images;
  if (jit_mode() == JitMode::off) {
    throw UnsupportedError(
        "There is no ahead-of-time image of " + kernels[0].name + " for " + target_of(kernels[0], arch) +
        ", and FLASHCUTE_JIT=off forbids to compile one. Set FLASHCUTE_JIT=on: it also allows images that "
        "`python -m flashcute compile` made beforehand, which keeps the wait out of the program");
  }
  DiskCache const cache(cache_folder(), cache_limit());
  struct Missing {
    CompileRequest request;
    std::string key;
    JitImage* image;
  };
  std::vector<Missing> missing;
  for (std::size_t i = 0; i < kernels.size(); ++i) {
    CompileRequest request = request_for(kernels[i], arch);
    std::string key = key_of(request);
    if (auto image = cache.find(key)) {
      images[i] = {*std::move(image), false};
    } else {
      missing.push_back({std::move(request), std::move(key), &images[i]});
    }
  }
  if (missing.empty()) return images;

  int const jobs = compile_jobs();
  ProgressLine line(missing[0].request.name, missing.size(), missing[0].request.arch, cache.folder());
  run_at_once(missing.size(), static_cast<std::size_t>(jobs), [&](std::size_t i) {
    Missing& m = missing[i];
    m.image->bytes = cache.get_or_build(
        m.key,
        [&] {
          Job const job(jobs);
          line.begin();
          return compile(m.request, line);
        },
        &m.image->compiled);
    line.one_more();
  });
  return images;
}

}  // namespace flashcute
