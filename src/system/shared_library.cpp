#include "system/shared_library.hpp"

#include <link.h>

#include "flashcute/error.hpp"

namespace flashcute {

std::optional<SharedLibrary> SharedLibrary::open(std::vector<std::string> const& candidates, std::string* problems) {
  for (std::string const& candidate : candidates) {
    // RTLD_NOW: a missing symbol is an error here, not in the middle of a call. RTLD_LOCAL: another CUDA version that
    // the process has loaded keeps its own symbols.
    void* const handle = dlopen(candidate.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
      char const* const reason = dlerror();
      if (problems != nullptr) *problems += std::string(reason != nullptr ? reason : "unknown error of dlopen") + "\n";
      continue;
    }
    link_map const* map = nullptr;
    bool const known = dlinfo(handle, RTLD_DI_LINKMAP, &map) == 0 && map->l_name[0] != '\0';
    return SharedLibrary(handle, known ? map->l_name : candidate);
  }
  return std::nullopt;
}

void* SharedLibrary::address(char const* name) const {
  void* const found = dlsym(handle_, name);
  if (found == nullptr) throw UnsupportedError(path_ + " has no function " + name + ": the library is too old");
  return found;
}

}  // namespace flashcute
