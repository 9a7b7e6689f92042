// Compiles a kernel for compute capability 8.0. The argument is the library's support folder; without one, the library
// has to find it.
#include <iostream>
#include <string>

#include "flashcute/api.hpp"

int main(int argc, char** argv) {
  if (std::string const folder = argc > 1 ? argv[1] : ""; !folder.empty()) {
    flashcute::set_search_paths({}, {folder + "/include", folder + "/include/cccl"}, folder + "/flashcute_compiler");
  }
  flashcute::ForwardConfig const config{.dtype = flashcute::DType::float16, .head_dim = 64};
  flashcute::Features const full{};
  try {
    for (auto const& [kernel, origin] : flashcute::prebuild(config, 80, {&full, 1})) {
      std::cout << kernel << ": " << origin << '\n';
    }
  } catch (flashcute::Error const& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
