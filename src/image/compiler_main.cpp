// The program flashcute_compiler, which the library starts (compiler_process.cpp): reads a request from its standard
// input, compiles it with NVRTC, and writes the image or the error to its standard output.
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <exception>
#include <string>
#include <string_view>

#include "image/message.hpp"
#include "image/nvrtc.hpp"

namespace {

std::string everything_from(int fd) {
  std::string text;
  std::array<char, 65536> part;
  while (true) {
    ssize_t const n = read(fd, part.data(), part.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return text;
    text.append(part.data(), static_cast<std::size_t>(n));
  }
}

bool write_all(int fd, std::string_view text) {
  while (!text.empty()) {
    ssize_t const n = write(fd, text.data(), text.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return false;
    text.remove_prefix(static_cast<std::size_t>(n));
  }
  return true;
}

}  // namespace

int main() {
  prctl(PR_SET_PDEATHSIG, SIGKILL);  // if the parent dies, nobody needs the image
  auto const parts = isatty(STDIN_FILENO) ? std::nullopt : flashcute::unpacked(everything_from(STDIN_FILENO));
  auto const includes = parts && parts->size() == 5 ? flashcute::unpacked(parts->at(3)) : std::nullopt;
  auto const options = parts && parts->size() == 5 ? flashcute::unpacked(parts->at(4)) : std::nullopt;
  if (!includes || !options) {
    std::fputs("flashcute_compiler is started by the flashcute library to compile a kernel, and is of no other use\n",
               stderr);
    return 2;
  }
  std::string answer;
  try {
    answer = flashcute::packed(
        {"image", flashcute::nvrtc_compile({parts->at(0), parts->at(1), parts->at(2), *includes, *options})});
  } catch (std::exception const& error) {
    answer = flashcute::packed({"error", error.what()});
  }
  return write_all(STDOUT_FILENO, answer) ? 0 : 1;
}
