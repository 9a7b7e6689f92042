// Build-time tool: prints the translation unit of one family of src/image/kernels.def.
#include <cstdio>

#include "image/families.hpp"
#include "image/source.hpp"

namespace {

/// Prints the unit of the family `name`; false if none has that name.
template <class Families>
bool print_unit(Families const& families, char const* name) {
  for (auto const& family : families) {
    if (family.name != name) continue;
    std::fputs(flashcute::generated_source(flashcute::kernels_of(family)).c_str(), stdout);
    return true;
  }
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 &&
      (print_unit(flashcute::forward_families, argv[1]) || print_unit(flashcute::backward_families, argv[1]) ||
       print_unit(flashcute::block_map_families, argv[1]))) {
    return 0;
  }
  std::fprintf(stderr, "usage: generate_unit FAMILY (a name from src/image/kernels.def)\n");
  return 1;
}
