#include "system/installation.hpp"

#include <dlfcn.h>
#include <link.h>

#include <system_error>

namespace flashcute {
namespace {

namespace fs = std::filesystem;

/// The shared library or program that this code is in.
fs::path this_file() {
  static char const here = 0;
  Dl_info info;
  void* map = nullptr;
  std::error_code ignored;
  if (dladdr1(&here, &info, &map, RTLD_DL_LINKMAP) == 0 || map == nullptr) return {};
  char const* const name = static_cast<link_map const*>(map)->l_name;
  // The program itself has no name there, and what dladdr calls it may be relative to another current directory.
  return fs::canonical(*name == '\0' ? "/proc/self/exe" : name, ignored);
}

}  // namespace

std::optional<fs::path> support_folder() {
  fs::path const folder = this_file().parent_path();
  // The build defines FLASHCUTE_LIB_FROM_BIN: "../lib" and the like.
  for (fs::path const& candidate : {folder / "flashcute", folder / FLASHCUTE_LIB_FROM_BIN / "flashcute"}) {
    std::error_code ignored;
    if (fs::is_regular_file(candidate / "include/flashcute/core/std.hpp", ignored)) return candidate.lexically_normal();
  }
  return std::nullopt;
}

}  // namespace flashcute
