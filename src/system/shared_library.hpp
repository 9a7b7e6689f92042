// Libraries that are opened when they are first needed and never linked: libcuda and libnvrtc may be missing.
#pragma once

#include <dlfcn.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace flashcute {

/// A library that stays open for the rest of the process. There is no close: a CUDA library starts threads, registers
/// exit handlers and hands out pointers that cannot be revoked, so unmapping it crashes later.
class SharedLibrary {
 public:
  /// Opens the first candidate (a path or a soname) that the loader accepts. If there is none and `problems` is
  /// given, it receives the loader's reason for each, one per line.
  static std::optional<SharedLibrary> open(std::vector<std::string> const& candidates, std::string* problems = nullptr);

  /// The file that was opened, also where the candidate was a plain soname.
  std::string const& path() const { return path_; }

  /// Pointer to the function `name`, for example symbol<int (*)(int*)>("cuDeviceGetCount"). Throws an
  /// UnsupportedError that names the library and the symbol where it is missing.
  template <class Fn>
  Fn symbol(char const* name) const {
    return reinterpret_cast<Fn>(address(name));
  }

  /// The same, but null where it is missing.
  template <class Fn>
  Fn find(char const* name) const {
    return reinterpret_cast<Fn>(dlsym(handle_, name));
  }

 private:
  SharedLibrary(void* handle, std::string path) : handle_(handle), path_(std::move(path)) {}
  void* address(char const* name) const;

  void* handle_;
  std::string path_;
};

}  // namespace flashcute
