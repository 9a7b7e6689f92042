// Compiles a kernel for compute capability 8.0, with nothing said about where the library's headers and its compiler are.
#include <exception>
#include <iostream>

#include "flashcute/api.hpp"

int main() {
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
