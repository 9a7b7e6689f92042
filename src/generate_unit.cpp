// Build-time tool: prints the translation unit of one family of src/kernels.def.
#include <cstdio>
#include <cstring>

#include "families.hpp"
#include "source.hpp"

int main(int argc, char** argv) {
  for (auto const& family : flashcute::forward_families) {
    if (argc == 2 && family.name == argv[1]) {
      auto const kernels = flashcute::kernels_of(family);
      std::fputs(flashcute::generated_source(kernels).c_str(), stdout);
      return 0;
    }
  }
  std::fprintf(stderr, "usage: generate_unit FAMILY (a name from src/kernels.def)\n");
  return 1;
}
